"""Restore sharded checkpoints into device buffers that XLA owns."""

from jaxgds.distributed import fail_together as fail_together
from jaxgds.errors import CheckpointError as CheckpointError
from jaxgds.load import load as load
from jaxgds.overlap import load_and_compile as load_and_compile
from jaxgds.report import FallbackError as FallbackError
from jaxgds.report import TransferReport as TransferReport
from jaxgds.report import last_report as last_report
