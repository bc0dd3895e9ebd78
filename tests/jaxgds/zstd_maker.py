"""zstd frames such as the format (RFC 8878) allows and no compressor writes."""

import random
import struct
from collections.abc import Iterator, Sequence

import zstandard
from zstd_frames import Frame


Table = list[tuple[int, int, int]]  # (symbol, bits, base) by state
LENGTHS = [  # the smallest value of a code, and how many bits say how much more
    *((i, 0) for i in range(16)),
    *((16, 1), (18, 1), (20, 1), (22, 1), (24, 2), (28, 2), (32, 3), (40, 3), (48, 4)),
    *((1 << i, i) for i in range(6, 17)),
]
MATCHES = [
    *((i, 0) for i in range(3, 35)),
    *((35, 1), (37, 1), (39, 1), (41, 1), (43, 2), (47, 2), (51, 3), (59, 3)),
    *((67, 4), (83, 4), (99, 5)),
    *(((1 << i) + 3, i) for i in range(7, 17)),
]
PREDEFINED = (
    (6, [4, 3] + [2] * 11 + [1] * 3 + [2] * 9 + [3, 2] + [1] * 5 + [-1] * 4),
    (5, [1] * 6 + [2] * 3 + [1] * 15 + [-1] * 5),
    (6, [1, 4, 3] + [2] * 6 + [1] * 37 + [-1] * 7),
)


class BitWriter:
    """What is written last is read first."""

    def __init__(self):
        self.value = self.size = 0

    def put(self, value: int, bits: int) -> None:
        assert 0 <= value < 1 << bits
        self.value |= value << self.size
        self.size += bits

    def backwards(self) -> bytes:
        return (self.value | 1 << self.size).to_bytes(self.size // 8 + 1, "little")

    def forwards(self) -> bytes:
        return self.value.to_bytes((self.size + 7) // 8, "little")


def random_distribution(rng: random.Random, symbols: Sequence[int], accuracy: int) -> list[int]:
    """Counts for some of `symbols`, which sum up to 2 ** accuracy."""
    total = 1 << accuracy
    chosen = rng.sample(symbols, rng.randint(1, min(len(symbols), total)))
    counts = [0] * (max(chosen) + 1)
    for symbol in chosen:
        counts[symbol] = 1
    for _ in range(total - len(chosen)):
        counts[rng.choice(chosen[: rng.choice([1, 2, len(chosen)])])] += 1
    return [-1 if count == 1 and rng.random() < 0.5 else count for count in counts]


def describe(counts: Sequence[int], accuracy: int) -> bytes:
    """RFC 4.1.1"""
    out = BitWriter()
    out.put(accuracy - 5, 4)
    remaining, at = 1 << accuracy, 0
    while remaining:
        count = counts[at]
        at += 1
        bits = (remaining + 1).bit_length()
        short_ones = (1 << bits) - 2 - remaining
        value = count + 1
        if value < short_ones:
            out.put(value, bits - 1)
        else:
            out.put(value if value < 1 << (bits - 1) else value + short_ones, bits)
        remaining -= abs(count)
        if count == 0:
            zeros = 0
            while counts[at + zeros] == 0:
                zeros += 1
            at += zeros
            while zeros >= 3:
                out.put(3, 2)
                zeros -= 3
            out.put(zeros, 2)
    return out.forwards()


def fse_table(counts: Sequence[int], accuracy: int) -> Table:
    size = 1 << accuracy
    rare = [symbol for symbol, count in enumerate(counts) if count < 0]
    places, at = [], 0
    while len(places) < size - len(rare):
        if at < size - len(rare):
            places.append(at)
        at = (at + (size >> 1) + (size >> 3) + 3) % size
    symbols = [0] * size
    for i, symbol in enumerate(rare):
        symbols[size - 1 - i] = symbol
    common = [symbol for symbol, count in enumerate(counts) for _ in range(max(count, 0))]
    for place, symbol in zip(places, common, strict=True):
        symbols[place] = symbol
    number = [abs(count) for count in counts]
    table = []
    for symbol in symbols:
        bits = accuracy - (number[symbol].bit_length() - 1)
        table.append((symbol, bits, (number[symbol] << bits) - size))
        number[symbol] += 1
    return table


class FseWriter:
    """Finds the states backwards, from the last symbol's, which is any of its states."""

    def __init__(self, table: Table, rng: random.Random, symbol: int):
        self.table = table
        self.states: dict[int, list[int]] = {}
        for state, (own, _, _) in enumerate(table):
            self.states.setdefault(own, []).append(state)
        self.state = rng.choice(self.states[symbol])

    def before(self, symbol: int, out: BitWriter) -> None:
        """Puts the bits that lead from a state of the symbol to the present one."""
        for state in self.states[symbol]:
            _, bits, base = self.table[state]
            if base <= self.state < base + (1 << bits):
                out.put(self.state - base, bits)
                self.state = state
                return
        raise AssertionError


def random_weights(rng: random.Random, deepest: int) -> tuple[list[int], int]:
    """Of a complete tree: leaves are split until there are enough or all are so deep."""
    depths = [1, 1]
    wanted = rng.choice([2, 3, 5, 20, 100, 129, 200, 256, 256])
    skew = rng.random()
    while len(depths) < wanted:
        leaves = [i for i, depth in enumerate(depths) if depth < deepest]
        if not leaves:
            break
        deep = rng.random() < skew
        i = max(leaves, key=depths.__getitem__) if deep else rng.choice(leaves)
        depths[i] += 1
        depths.append(depths[i])
    deepest = max(depths)
    count = len(depths)
    symbols = rng.sample(range(256), count) if rng.random() < 0.5 else list(range(count))
    weights = [0] * (max(symbols) + 1)
    for symbol, depth in zip(symbols, depths, strict=True):
        weights[symbol] = deepest + 1 - depth
    return weights, deepest


def huffman_codes(weights: Sequence[int], deepest: int) -> dict[int, tuple[int, int]]:
    codes, at = {}, 0
    for weight in range(1, deepest + 1):
        for symbol, own in enumerate(weights):
            if own == weight:
                codes[symbol] = (at >> (weight - 1), deepest + 1 - weight)
                at += 1 << (weight - 1)
    assert at == 1 << deepest
    return codes


def describe_weights(weights: Sequence[int], rng: random.Random) -> bytes | None:
    """RFC 4.2.1; None where there is no way to."""
    listed = list(weights[:-1])  # the last is implied
    if len(listed) <= 128 and rng.random() < 0.5:
        padded = listed + [0] * (len(listed) % 2)
        pairs = zip(padded[::2], padded[1::2], strict=True)
        return bytes([127 + len(listed), *(a << 4 | b for a, b in pairs)])
    if len(listed) < 2:
        return None
    for _ in range(20):
        accuracy = rng.choice([5, 6])
        chosen = sorted(set(listed))
        counts = [0] * (max(chosen) + 1)
        for weight in chosen:
            counts[weight] = 1
        for _ in range((1 << accuracy) - len(chosen)):
            counts[rng.choice(listed)] += 1
        table = fse_table(counts, accuracy)
        out = BitWriter()
        last = len(listed) - 1
        ends = listed[last - 1 :] if last % 2 else listed[: last - 2 : -1]
        writers = [FseWriter(table, rng, weight) for weight in ends]
        # The end is seen where bits run out: after the weight before the last
        if table[writers[(last - 1) % 2].state][1] == 0:
            continue
        for i in range(last - 2, -1, -1):
            writers[i % 2].before(listed[i], out)
        out.put(writers[1].state, accuracy)
        out.put(writers[0].state, accuracy)
        body = describe(counts, accuracy) + out.backwards()
        if len(body) < 128:
            return bytes([len(body)]) + body
    return None


def huffman_stream(data: bytes, codes: dict[int, tuple[int, int]]) -> bytes:
    out = BitWriter()
    for symbol in reversed(data):
        out.put(*codes[symbol])
    return out.backwards()


class Maker:
    """Makes a frame of random blocks, and what it stands for.

    `many` is how many sequences each block has. `evil` is how likely offsets lead nowhere (then the
    frame is `broken`), codes are too long and four streams have too few literals.
    """

    def __init__(self, rng: random.Random, many: int = 0, evil: float = 0.0):
        self.rng, self.many, self.evil = rng, many, evil
        self.broken = False
        self.output = bytearray()
        self.offsets = [1, 4, 8]
        self.codes: dict[int, tuple[int, int]] | None = None
        self.tables: list[Table | None] = [None, None, None]

    def literals(self) -> tuple[bytes, bytes] | None:
        """The section, and the literals."""
        rng = self.rng
        kind = rng.randrange(4)
        size = rng.choice([0, 1, rng.randint(0, 40), rng.randint(0, 1100), rng.randint(0, 5000)])
        if kind < 2:
            form = rng.choice([f for f, most in ((0, 31), (1, 4095), (3, 1 << 20)) if size <= most])
            head = {1: size << 4 | 4, 3: size << 4 | 12}.get(form, size << 3 | form << 2) | kind
            data = rng.randbytes(size) if kind == 0 else rng.randbytes(1) * size
            source = data if kind == 0 else data[:1] or b"?"
            return head.to_bytes({1: 2, 3: 3}.get(form, 1), "little") + source, data
        body = b""
        if kind == 2:
            weights, deepest = random_weights(rng, 14 if rng.random() < self.evil else 11)
            description = describe_weights(weights, rng)
            if description is None:
                return None
            body, self.codes = description, huffman_codes(weights, deepest)
        if self.codes is None:
            return None
        likely = [1 << (14 - bits) for _, bits in self.codes.values()]
        likely = likely if rng.random() < 0.5 else None
        data = bytes(rng.choices(list(self.codes), likely, k=max(size, 1)))
        if len(data) >= (1 if rng.random() < self.evil else 6) and rng.random() < 0.7:
            part = (len(data) + 3) // 4
            parts = [*(data[i * part : (i + 1) * part] for i in range(3)), data[3 * part :]]
            streams = [huffman_stream(part, self.codes) for part in parts]
            body += struct.pack("<3H", *map(len, streams[:3])) + b"".join(streams)
            forms = [1, 2, 3]
        else:
            body += huffman_stream(data, self.codes)
            forms = [0]
        widths = (10, 10, 14, 18)
        forms = [f for f in forms if max(len(body), len(data)) < 1 << widths[f]]
        if not forms:
            return None
        form = rng.choice(forms)
        head = kind | form << 2 | len(data) << 4 | len(body) << (4 + widths[form])
        return head.to_bytes((3, 3, 4, 5)[form], "little") + body, data

    def table(self, which: int, symbols: list[int]) -> tuple[int, bytes, Table]:
        """Its mode and description, and the table itself, of symbols that can be used."""
        rng = self.rng
        while True:
            mode = rng.randrange(4)
            if mode == 0:
                accuracy, counts = PREDEFINED[which]
                return 0, b"", fse_table(counts, accuracy)
            if mode == 1:
                symbol = rng.choice(symbols)
                return 1, bytes([symbol]), [(symbol, 0, 0)]
            if mode == 2:
                accuracy = rng.randint(5, (9, 8, 9)[which])
                counts = random_distribution(rng, symbols, accuracy)
                return 2, describe(counts, accuracy), fse_table(counts, accuracy)
            if known := self.tables[which]:
                return 3, b"", known

    def resolve(self, value: int, length: int) -> list[int]:
        """RFC 3.1.1.5: the repeated offsets after a sequence; the first is its own."""
        first, second, third = self.offsets
        if value > 3:
            return [value - 3, first, second]
        which = value - (length > 0)
        if which == 0:
            return [first, second, third]
        if which == 1:
            return [second, first, third]
        return [third if which == 2 else first - 1, first, second]

    def block(self) -> bytes | None:
        """A compressed block's content; or None, and then nothing has changed."""
        before = bytearray(self.output), self.offsets, self.codes, self.tables
        content = self.any_block()
        if content is None or len(content) > 128 << 10:
            self.output, self.offsets, self.codes, self.tables = before
            return None
        return content

    def any_block(self) -> bytes | None:
        rng = self.rng
        made = self.literals()
        if made is None:
            return None
        section, literals = made
        count = rng.choice([0, 1, 2, 5, rng.randint(0, 200), rng.randint(0, 400)])
        symbols = (
            [list(range(36)), list(range(8)), [0, 1]],
            [list(range(32)), list(range(11)), [0, 1], [0, 1, 2, 3]],
            [list(range(53)), list(range(20)), [0, 32, 40]],
        )
        described = [self.table(which, rng.choice(some)) for which, some in enumerate(symbols)]
        if self.many:
            shortest: tuple[int, bytes, Table] = (1, b"\0", [(0, 0, 0)])
            count, described = self.many, [shortest, described[1], shortest]
            if not {0, 1, 2} & {symbol for symbol, _, _ in described[1][2]}:
                return None
        modes, descriptions, tables = zip(*described, strict=True)
        sequences = self.sequences(count, literals, tables)
        count = len(sequences)
        if count == 0:
            return section + b"\0"
        if count < 128 and rng.random() >= 0.1:
            head = bytes([count])
        elif count < 0x7F00:
            head = bytes([128 + (count >> 8), count & 255])
        else:
            head = b"\xff" + (count - 0x7F00).to_bytes(2, "little")
        head += bytes([modes[0] << 6 | modes[1] << 4 | modes[2] << 2]) + b"".join(descriptions)
        self.tables = list(tables)
        out = BitWriter()
        last = sequences[-1]
        writers = [FseWriter(t, rng, last[2 * i]) for i, t in enumerate(tables)]
        for sequence in reversed(sequences):
            if sequence is not last:
                for which in (1, 2, 0):
                    writers[which].before(sequence[2 * which], out)
            length_code, length_more, offset_code, offset_more, match_code, match_more = sequence
            out.put(length_more, LENGTHS[length_code][1])
            out.put(match_more, MATCHES[match_code][1])
            out.put(offset_more, offset_code)
        for which in (2, 1, 0):
            out.put(writers[which].state, (len(tables[which]) - 1).bit_length())
        return section + head + out.backwards()

    def sequences(self, count: int, literals: bytes, tables: Sequence[Table]) -> list[tuple]:
        """Codes and their extra bits; what they stand for goes to the output, then the rest."""
        rng = self.rng
        have = [sorted({symbol for symbol, _, _ in table}) for table in tables]
        sequences, used, room = [], 0, (128 << 10) - len(literals)
        for _ in range(count):
            for _ in range(8):
                length_code, offset_code, match_code = map(rng.choice, have)
                (length, length_bits), (match, match_bits) = (
                    LENGTHS[length_code],
                    MATCHES[match_code],
                )
                length_more, match_more = rng.getrandbits(length_bits), rng.getrandbits(match_bits)
                length, match = length + length_more, match + match_more
                position = len(self.output) + length
                if used + length > len(literals) or match > min(room, 20_000):
                    continue
                most = position + 3 + (rng.random() < self.evil)
                most = min((2 << offset_code) - 1, most)
                if most < 1 << offset_code:
                    continue
                value = rng.randint(1 << offset_code, most)
                resolved = self.resolve(value, length)
                if not 0 < resolved[0] <= position:
                    if rng.random() >= self.evil:
                        continue
                    self.broken = True
                break
            else:
                break
            self.offsets = resolved
            self.output += literals[used : used + length]
            used += length
            at = max(len(self.output) - resolved[0], 0)
            unit = self.output[at : at + match] or b"?"
            self.output += (unit * (match // len(unit) + 1))[:match]
            room -= match
            offset_more = value - (1 << offset_code)
            codes = (length_code, length_more, offset_code, offset_more, match_code, match_more)
            sequences.append(codes)
        self.output += literals[used:]
        return sequences

    def frame(self) -> bytes:
        rng = self.rng
        blocks = []
        for _ in range(4 if self.many else rng.choice([1, 2, 4, 8, 15])):
            kind = min(rng.randrange(8), 2)
            size = rng.choice([0, 1, 7, rng.randint(0, 3000)])
            if kind == 2:
                content = self.block()
                if content is not None:
                    blocks.append((2, len(content), content))
                continue
            content = rng.randbytes(1 if kind else size)
            self.output += content * size if kind else content
            blocks.append((kind, size, content))
        blocks = blocks or [(0, 0, b"")]
        total = len(self.output)
        large = total > 128 << 10
        frame = struct.pack("<I", zstandard.MAGIC_NUMBER) + rng.choice(
            [
                bytes([0, 9 << 3]),
                bytes([1, 10 << 3 | 3, 0]),
                struct.pack("<BBI", 0x80, 7 << 3 | 7, total),
                struct.pack("<BQ", 0xE0, total) if large else bytes([2, 9 << 3, 0, 0]),
            ]
        )
        for i, (kind, size, content) in enumerate(blocks):
            header = size << 3 | kind << 1 | (i + 1 == len(blocks))
            frame += header.to_bytes(3, "little") + content
        return frame


def made_frames(count: int, seed: int) -> Iterator[Frame]:
    rng = random.Random(seed)
    while count:
        maker = Maker(rng)
        frame = maker.frame()
        if len(maker.output) <= 500_000:  # with the smallest window above
            yield frame, bytes(maker.output)
            count -= 1
