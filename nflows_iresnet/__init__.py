"""Invertible residual networks for nflows: every number is exact, or carries its error.

    from nflows_iresnet import ResidualFlow, ResidualTransform

`ResidualFlow` is a whole model with the arguments of nflows' `SimpleRealNVP`; `ResidualTransform`
is one block y = x + g(x) to put between other transforms. The rooms: `nn` (networks with a
certified Lipschitz bound), `logdet` and `solvers` (strategies), `transforms`, `flows`,
`classifiers`, `datasets`, `graphs` (a training step as one CUDA graph),
`training` (training that stops by itself), `testing` (the contract, for your own transforms too).
Adapters are imported by name: `nflows_iresnet.interop.normflows`, `.distributions`, `.sbi`.
`load_run(folder)` returns a flow that the command `nflows-iresnet compare` has trained.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nflows_iresnet import (
        classifiers,
        datasets,
        flows,
        graphs,
        linearization,
        logdet,
        nn,
        solvers,
        testing,
        training,
        transforms,
    )
    from nflows_iresnet.experiments.saved import load_run
    from nflows_iresnet.flows import ResidualFlow
    from nflows_iresnet.transforms import ResidualTransform

__version__ = "0.1.0"
__all__ = [
    "ResidualFlow",
    "ResidualTransform",
    "classifiers",
    "datasets",
    "flows",
    "graphs",
    "linearization",
    "load_run",
    "logdet",
    "nn",
    "solvers",
    "testing",
    "training",
    "transforms",
]
_HOMES = {
    "ResidualFlow": "flows",
    "ResidualTransform": "transforms",
    "load_run": "experiments.saved",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what is asked for, so that the command can answer before torch is there."""
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = import_module(f"{__name__}.{_HOMES.get(name, name)}")
        globals()[name] = getattr(home, name) if name in _HOMES else home
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
