"""Damaged zstd frames."""

import random
import struct
from collections.abc import Iterator

import numpy as np
import zstandard
from zstd_frames import Frame, bf16, compress, flushed, words
from zstd_maker import made_frames


def one_block(content: bytes) -> bytes:
    header = struct.pack("<IBB", zstandard.MAGIC_NUMBER, 0, 9 << 3)
    return header + (len(content) << 3 | 5).to_bytes(3, "little") + content


def blocks_of(frame: bytes) -> list[tuple[int, int]]:
    """Where the headers of a frame's compressed blocks are, and the blocks' sizes."""
    at = zstandard.frame_header_size(frame)
    found, last = [], 0
    while not last:
        header = int.from_bytes(frame[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == 2:
            found.append((at, size))
        at += 3 + (1 if kind == 1 else size)
    return found


def damage_a_block(frame: bytes, rng: random.Random) -> bytes:
    """Damages the content of a block, whose size stays right: only decoding the block tells."""
    found = blocks_of(frame)
    if not found:
        return frame
    at, size = rng.choice(found)
    content = bytearray(frame[at + 3 : at + 3 + size])
    rest, last = frame[at + 3 + size :], frame[at] & 1
    how = rng.randrange(6)
    if how < 2:  # cut off, and the frame ends here
        del content[rng.randrange(rng.choice([size, min(size, 16), min(size, 150)])) :]
        rest, last = b"", 1
    if how in (1, 2):  # the headers
        for _ in range(rng.randint(1, 3)):
            if content:
                most = min(len(content), rng.choice([2, 5, 12]))
                content[rng.randrange(most)] = rng.randrange(256)
    elif how == 3:  # something more, or less
        place = rng.randrange(size)
        content[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    elif how == 4:  # few literals in four streams, or what looks like it
        few = rng.choice([2, 3]) | rng.choice([1, 2, 3]) << 2 | rng.randrange(12) << 4
        few |= int.from_bytes(content[:3], "little") & 0xFFC000
        content[:3] = few.to_bytes(3, "little")
    elif how == 5:
        content = bytearray(rng.randbytes(rng.choice([2, 3, 4, 5, 8, 12, 30])))
        if rng.random() < 0.5:
            content[0] = content[0] & 0xF0 | rng.choice([0, 1, 2, 2, 6, 6, 10, 14])
        if rng.random() < 0.5:
            rest, last = b"", 1
    header = (len(content) << 3 | 4 | last).to_bytes(3, "little")
    return frame[:at] + header + bytes(content) + rest


def damage(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    """Damages a frame anywhere, or splices it with another."""
    changed = bytearray(frame)
    at = rng.randrange(len(frame))
    how = rng.randrange(8)
    if how < 4:  # flips, more of them near the beginning, where the tables are
        for _ in range(rng.choice([1, 1, 1, 2, 4, 20])):
            most = min(len(frame), rng.choice([len(frame), 60, 200]))
            changed[rng.randrange(most)] ^= 1 << rng.randrange(8)
    elif how == 4:
        del changed[at + 1 :]
    elif how == 5:
        changed[at:] = other[rng.randrange(len(other)) :]
    elif how == 6:  # a byte set, inserted or removed
        byte = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        changed[at : at + rng.choice([0, 1, 3])] = bytes([byte])
    else:  # random bytes in a row
        length = min(rng.randint(1, 16), len(frame) - at)
        changed[at : at + length] = rng.randbytes(length)
    return bytes(changed)


def damaged_frames(count: int, rng: random.Random) -> Iterator[tuple[bytes, int]]:
    """Frames, and the room that there is for the output."""
    originals: list[Frame] = list(made_frames(60, rng.getrandbits(32)))
    originals = [(frame, data) for frame, data in originals if len(data) <= 200_000]
    for size in (40, 300, 1500, 6000, 20_000):
        seed = rng.getrandbits(32)
        numbers = np.random.default_rng(seed)
        text = words(size, seed, 60)
        datas = [
            (bf16(size // 2, seed), {"level": 1}),
            (text, {"level": rng.choice([1, 3, 19])}),
            (text, {"level": 19, "min_match": 3}),
            (bytes(v >> 4 for v in numbers.bytes(size)), {"level": 1}),
            (numbers.integers(0, 1000, size // 4).cumsum().astype("<i4").tobytes(), {"level": 3}),
            (numbers.bytes(size // 2) + bytes(size // 2), {"level": 1}),
        ]
        for data, options in datas:
            for content_size in (True, False):
                originals.append((compress(data, content_size=content_size, **options), data))
    text, weights = words(6000, seed), bf16(5000, seed)
    originals.append((flushed(text, rng, 3, 800), text))
    originals.append((flushed(weights, rng, 1, 2000), weights))
    originals.append((compress(text[:3000], 3, checksum=True), text[:3000]))
    for _ in range(count):
        (frame, data), (other, more) = rng.choice(originals), rng.choice(originals)
        size = len(data)
        if rng.random() < 0.5:
            yield damage_a_block(frame, rng), rng.choice([size, size + 1000, 200_000])
        else:
            sizes = [size, size, size + 1000, max(size - 1, 0), max(size, len(more)), 200_000]
            yield damage(frame, other, rng), rng.choice(sizes)
