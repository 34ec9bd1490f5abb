"""Bridges to other libraries, each imported by its name: `nflows_iresnet.interop.normflows`.

`distributions` for `torch.distributions`, Pyro and zuko; `normflows`; `sbi`.
"""
