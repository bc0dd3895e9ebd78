"""TurboQuant KV-cache compression for JAX: codec, cache and attention over the packed codes."""

from pallas_kernels.attention import attend as attend
from pallas_kernels.attention import decode_attention as decode_attention
from pallas_kernels.attention import prefill_attention as prefill_attention
from pallas_kernels.cache import KVCache as KVCache
from pallas_kernels.codebook import distortion as distortion
from pallas_kernels.codec import Quantized as Quantized
from pallas_kernels.format import KVFormat as KVFormat
from pallas_kernels.variants import QuantizedProd as QuantizedProd
from pallas_kernels.variants import QuantizedSplit as QuantizedSplit
from pallas_kernels.variants import outlier_channels as outlier_channels
from pallas_kernels.variants import quantize as quantize
from pallas_kernels.variants import quantize_prod as quantize_prod
from pallas_kernels.variants import quantize_split as quantize_split
