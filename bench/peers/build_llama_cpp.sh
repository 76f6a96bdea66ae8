#!/usr/bin/env bash
# Builds llama.cpp's tools, and llama_decode_times.cpp beside them, from the PyPI source package of llama-cpp-python.
#
#   bench/peers/build_llama_cpp.sh [FOLDER]          (default FOLDER: ~/.cache/tightfit-bench/llama.cpp)
#
# Needs pip, cmake 3.14 or later and a C++17 compiler. What is built lands in FOLDER/bin, what it was built from in
# FOLDER/version.json. Environment: LLAMA_CPP_PYTHON_VERSION (default 0.3.36), JOBS (default 2), PYTHON (default python3).
set -euo pipefail

folder=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/tightfit-bench/llama.cpp}")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
package_version=${LLAMA_CPP_PYTHON_VERSION:-0.3.36}
jobs=${JOBS:-2}
python=${PYTHON:-python3}
package=$folder/llama_cpp_python-$package_version
source=$package/vendor/llama.cpp
head_file=.git/modules/vendor/llama.cpp/HEAD
targets=(llama-bench llama-completion llama-simple llama-quantize llama-perplexity)
settings=(
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
)

mkdir -p "$folder/bin"
if [ ! -f "$source/CMakeLists.txt" ]; then
    "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$folder" "llama-cpp-python==$package_version"
    tar -xzf "$package.tar.gz" -C "$folder" "llama_cpp_python-$package_version/vendor/llama.cpp" \
        "llama_cpp_python-$package_version/$head_file"
    rm -f "$source/.git" "$package.tar.gz"
fi
commit=$(cut -c1-12 "$package/$head_file")

# The source is no checkout: keep cmake from asking git, which would answer for whatever checkout lies above the folder.
cmake -S "$source" -B "$folder/build" "${settings[@]}" \
    -DCMAKE_DISABLE_FIND_PACKAGE_Git=ON -DGIT_EXECUTABLE=/bin/false -DLLAMA_BUILD_NUMBER=0 "-DLLAMA_BUILD_COMMIT=$commit"
nice -n 5 cmake --build "$folder/build" --parallel "$jobs" --target "${targets[@]}"
for target in "${targets[@]}"; do cp "$folder/build/bin/$target" "$folder/bin/"; done

ggml=$folder/build/ggml/src
"${CXX:-c++}" -O2 -std=c++17 -I "$source/include" -I "$source/ggml/include" "$here/llama_decode_times.cpp" \
    "$folder/build/src/libllama.a" -Wl,--start-group "$ggml/libggml.a" "$ggml/libggml-cpu.a" "$ggml/libggml-base.a" \
    -Wl,--end-group -fopenmp -pthread -ldl -o "$folder/bin/llama_decode_times"

llama_version=$(sed -n 's/^set(LLAMA_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\))$/\2/p' "$source/CMakeLists.txt" | paste -sd.)
printf '{"llama_cpp": "%s-dev", "commit": "%s", "llama_cpp_python": "%s", "cmake_settings": "%s"}\n' \
    "$llama_version" "$commit" "$package_version" "${settings[*]}" | tee "$folder/version.json"
