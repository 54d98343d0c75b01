"""Efficient attention by plan: sparse, hybrid and linear, on CPUs.

    import tessera
    o = tessera.attention(q, k, v, method="xattention", causal=True, tau=0.9)
    plan = tessera.plan(q, k, method="xattention", causal=True)
    o, lse = tessera.run(plan, q, k, v, return_lse=True)

`tessera.methods()` lists the methods, `tessera.Model` runs models. `tessera.torch` has modules, and
`tessera.integrations` plugs methods into Transformers and Diffusers.
"""

from ._core import Error, Problem, State, TokenGrid, default_isa, supported_isas
from ._functional import Gradients, Report, attention, plan, problem_of, run, run_backward
from ._methods import Method, MethodInfo, Parameter, SideInput, methods
from ._model import Evaluation, Generation, Model, Session, tasks
from ._plan import ENTRY, Plan, Source, Statistics, Transpose

__version__ = "0.1.0"

__all__ = [
    "ENTRY",
    "Error",
    "Evaluation",
    "Generation",
    "Gradients",
    "Method",
    "MethodInfo",
    "Model",
    "Parameter",
    "Plan",
    "Problem",
    "Report",
    "Session",
    "SideInput",
    "Source",
    "State",
    "Statistics",
    "TokenGrid",
    "Transpose",
    "attention",
    "default_isa",
    "methods",
    "plan",
    "problem_of",
    "run",
    "run_backward",
    "supported_isas",
    "tasks",
]
