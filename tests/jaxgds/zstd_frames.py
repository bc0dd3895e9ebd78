"""zstd frames of all kinds of data, and what zstandard makes of them."""

import functools
import random

import numpy as np
import zstandard


Frame = tuple[bytes, bytes]  # and what it stands for


def bf16(count: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).standard_normal(count) * 0.02
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def words(size: int, seed: int = 0, vocabulary: int = 300) -> bytes:
    rng = random.Random(seed)
    known = [bytes(rng.choices(range(97, 123), k=rng.randint(1, 9))) for _ in range(vocabulary)]
    text = bytearray()
    while len(text) < size:
        text += rng.choice(known) + (b" " if rng.random() < 0.9 else b".\n")
    return bytes(text[:size])


@functools.cache
def kinds() -> dict[str, bytes]:
    """Data that compresses in different ways."""
    rng = np.random.default_rng(3)
    letters = np.frombuffer(b"abcde", np.uint8)
    few = rng.choice(letters, 300_000, p=[0.9, 0.05, 0.03, 0.015, 0.005]).tobytes()
    normal = rng.standard_normal(150_000).astype(np.float32)
    f32 = (normal * np.float32(0.02)).tobytes()
    mixed = [bf16(70_000, 5), bytes(140_000), words(150_000, 7), rng.bytes(200_000), few[:90_000]]
    result = {
        "bf16": bf16(350_000),
        "f32": f32,
        "zeros": bytes(500_000),
        "random": rng.bytes(300_001),
        "words": words(400_000),
        "periodic": (b"0123456789abcdef-" * 20_000)[:320_003],
        "few": few,
        "ones": np.ones(100_000, np.float32).tobytes(),
        "run": b"start" + b"x" * 300_000 + b"end",
        "steps": np.cumsum(rng.integers(0, 3, 100_000)).astype(np.int32).tobytes(),
        "mixed": b"".join([*mixed, bf16(70_000, 5), b"\xff" * 131_072, f32[:140_001]]),
        "sparse": (normal * (rng.random(150_000) < 0.1)).tobytes()[:400_000],
        "odd": bf16(65_537, 9)[:131_073],
    }
    for size in (0, 1, 2, 3, 5, 6, 7, 8, 15, 31, 63, 64, 100, 255, 256, 257, 300):
        result[f"tiny {size}"] = words(size, size)
        result[f"tiny bf16 {size}"] = bf16(size)[:size]
        result[f"tiny zeros {size}"] = bytes(size)
    return result


def compress(
    data: bytes, level: int = 1, checksum: bool = False, content_size: bool = True, **parameters
) -> bytes:
    options = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=len(data),
        write_checksum=checksum,
        write_content_size=content_size,
        **parameters,
    )
    return zstandard.ZstdCompressor(compression_params=options).compress(data)


def flushed(
    data: bytes, rng: random.Random, level: int = 3, most: int = 3000, checksum: bool = False
) -> bytes:
    """A frame of many small blocks."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compressobj()
    frame, at = b"", 0
    while at < len(data):
        size = rng.choice([rng.randint(1, 20), rng.randint(1, most)])
        frame += compressor.compress(data[at : at + size])
        frame += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        at += size
    return frame + compressor.flush()


def every(size: int, piece: int) -> list[int]:
    return [*range(piece, size, piece), size]


def random_cuts(size: int, rng: random.Random, most: int = 12) -> list[int]:
    """Where the pieces of a frame end."""
    cuts = {rng.randint(1, size) for _ in range(rng.randint(0, most))}
    if rng.random() < 0.3:  # some very small pieces
        begin = rng.randint(1, size)
        cuts.update(range(begin, min(size, begin + rng.randint(1, 40))))
    return sorted(cuts | {size})


def reference(frame: bytes, capacity: int) -> tuple[bytes | None, str]:
    """The bytes by zstandard; or None and its complaint."""
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size != zstandard.CONTENTSIZE_UNKNOWN and size > capacity:
            return None, "too large"
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        room = max(capacity, 1)
        return decompressor.decompress(frame, max_output_size=room, allow_extra_data=True), ""
    except (zstandard.ZstdError, MemoryError) as error:
        return None, str(error)
