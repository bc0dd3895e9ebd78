"""Attention over a KVCache as Pallas Mosaic GPU kernels: the only place that uses that API."""

from pallas_kernels.mosaic.attention import architecture as architecture
from pallas_kernels.mosaic.attention import decode_attention as decode_attention
from pallas_kernels.mosaic.attention import unsupported as unsupported
from pallas_kernels.mosaic.config import Config as Config
from pallas_kernels.mosaic.prefill import prefill_attention as prefill_attention
