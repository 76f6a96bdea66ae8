"""tightfit fits big models into small memory: plan, run and measure inside an absolute budget.

The face: nouns and verbs, loaded when they are first used, so that `import tightfit` costs nothing.
"""

from importlib import import_module
from typing import Any

from tightfit import pretrained

__version__ = "0.1.0"

_FACE = {
    "Budget": "terms.budget",
    "Footprint": "terms.footprint",
    "Machine": "terms.machine",
    "Plan": "terms.plan",
    "QuantizePlan": "terms.quantizing",
    "QuantizeReport": "terms.quantizing",
    "Report": "terms.report",
    "TightfitError": "terms.errors",
    "Tuning": "terms.tuning",
    "Workload": "terms.workload",
    "Sampling": "runtime.generate",
    "Skeleton": "describe.skeleton",
    "apply": "verbs",
    "build": "runtime.build",
    "generate": "runtime.generate",
    "evaluate": "verbs",
    "PolicyCallback": "runtime.callback",
    "export_model": "runtime.export_model",
    "export_peft": "runtime.export",
    "load_adapter": "runtime.adapters",
    "plan": "verbs",
    "plan_quantize": "verbs.quantizing",
    "plan_tuning": "verbs.tuning",
    "quantize": "verbs.quantizing",
    "read_adapter": "runtime.adapters",
    "read_calibration": "verbs.quantizing",
    "read_lesson": "verbs.tuning",
    "tune": "verbs.tuning",
    "probe": "runtime.probe",
    "run": "verbs",
    "save_adapter": "verbs",
}

__all__ = sorted(_FACE)

pretrained.enter()


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"tightfit has no `{name}`")
    value = getattr(import_module(f"tightfit.{_FACE[name]}"), name)
    globals()[name] = value
    return value
