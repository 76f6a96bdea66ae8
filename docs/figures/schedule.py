"""Schedule: draws `schedule.png` for docs/guide-place-on-several-devices.md from a real placement. `python docs/figures/schedule.py`.

It places with the rates of an unprobed machine, so that the picture is much the same wherever it is drawn.
"""

import os
import tempfile
from pathlib import Path

from tightfit.picture import draw_schedule
from tightfit.verbs.placing import Step, place_model, read_cluster


def draw(file: Path) -> None:
    """One step of tuning GPT-2 on devices that cannot hold it alone."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["TIGHTFIT_HOME"] = home
        step = Step(batch=4, tokens=128, training=True, grain="module")
        draw_schedule(place_model("gpt2", read_cluster("2x2150MiB"), step, seconds=8), str(file))


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
