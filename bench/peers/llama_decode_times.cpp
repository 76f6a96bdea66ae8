// Times every token that llama.cpp decodes, through its C API, and prints one JSON object; build_llama_cpp.sh builds it.
//
//   llama_decode_times MODEL.gguf TOKENS THREADS PROMPT_TOKENS LOAD_MODE(mmap|none|mlock|dio) REPACK(0|1)
//
// The first token comes out of the prefill; token_seconds holds the TOKENS - 1 decode steps after it. Greedy, no early stop.
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

static double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// The number behind `key` in a /proc file of "key: number" lines, or -1.
static long long proc_number(const char * path, const std::string & key) {
    std::ifstream file(path);
    for (std::string word; file >> word;) {
        long long number = -1;
        if (word == key && file >> number) {
            return number;
        }
    }
    return -1;
}

static llama_token step(llama_context * ctx, std::vector<llama_token> tokens, int n_vocab) {
    if (llama_decode(ctx, llama_batch_get_one(tokens.data(), (int32_t) tokens.size())) != 0) {
        fprintf(stderr, "llama_decode failed\n");
        exit(1);
    }
    const float * logits = llama_get_logits_ith(ctx, -1);
    return (llama_token) (std::max_element(logits, logits + n_vocab) - logits);
}

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR || level == GGML_LOG_LEVEL_WARN) {
        fputs(text, stderr);
    }
}

static llama_context * open_context(llama_model * model, int tokens, int threads, int prompt_tokens) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = tokens + prompt_tokens;
    params.n_batch = prompt_tokens;
    params.n_ubatch = std::min(prompt_tokens, 512);
    params.n_threads = threads;
    params.n_threads_batch = threads;
    return llama_init_from_model(model, params);
}

static void print_result(const std::vector<double> & seconds, double load, double prefill) {
    printf("{\"load_seconds\": %.6f, \"prefill_seconds\": %.6f, \"token_seconds\": [", load, prefill);
    for (size_t i = 0; i < seconds.size(); i++) {
        printf("%s%.6f", i ? ", " : "", seconds[i]);
    }
    printf("], \"peak_rss_bytes\": %lld, ", proc_number("/proc/self/status", "VmHWM:") * 1024);
    printf("\"disk_read_bytes\": %lld, ", proc_number("/proc/self/io", "read_bytes:"));
    printf("\"llama_version\": \"%s\", \"system_info\": \"%s\"}\n", llama_version(), llama_print_system_info());
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: %s MODEL.gguf TOKENS THREADS PROMPT_TOKENS LOAD_MODE REPACK\n", argv[0]);
        return 2;
    }
    const int tokens = atoi(argv[2]), threads = atoi(argv[3]), prompt_tokens = atoi(argv[4]);
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.load_mode = llama_load_mode_from_str(argv[5]);
    params.use_extra_bufts = atoi(argv[6]) != 0;
    params.n_gpu_layers = 0;

    const double start = now();
    llama_model * model = llama_model_load_from_file(argv[1], params);
    llama_context * ctx = model ? open_context(model, tokens, threads, prompt_tokens) : nullptr;
    if (!ctx) {
        fprintf(stderr, "could not load %s\n", argv[1]);
        return 1;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> prompt(prompt_tokens);
    for (int i = 0; i < prompt_tokens; i++) {
        prompt[i] = 300 + (i * 7919) % (n_vocab - 300);
    }

    const double loaded = now();
    llama_token token = step(ctx, prompt, n_vocab);
    const double prefilled = now();
    std::vector<double> seconds;
    for (int i = 1; i < tokens; i++) {
        const double before = now();
        token = step(ctx, {token}, n_vocab);
        seconds.push_back(now() - before);
    }
    print_result(seconds, loaded - start, prefilled - loaded);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
