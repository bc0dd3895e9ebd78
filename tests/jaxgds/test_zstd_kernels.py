"""zstd.cu as C++ (zstd_emulated.cpp), mostly under sanitizers, against the zstandard package.

JAXGDS_FUZZ_SECONDS=600 makes the test of damaged frames run that long, with new ones.
"""

import os
import pathlib
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zstd_damage import blocks_of, damaged_frames, one_block
from zstd_frames import bf16, compress, every, flushed, kinds, random_cuts, reference, words
from zstd_maker import BitWriter, Maker, describe, made_frames, random_distribution


SOURCE = pathlib.Path(__file__).parent / "zstd_emulated.cpp"
LARGE = ["-DMAX_BLOCKS=1024u", "-DMAX_SEQUENCES=(1u<<18)"]  # for frames in one piece
SMALL = ["-DMAX_BLOCKS=512u", "-DMAX_SEQUENCES=(1u<<16)"]
TINY = ["-DMAX_BLOCKS=8u", "-DMAX_SEQUENCES=100u"]
UNKNOWN = 2**64 - 1


class Case(NamedTuple):
    frame: bytes
    capacity: int
    cuts: Sequence[int]  # where the pieces end
    shape: int = 0  # of the launches; see zstd_emulated.cpp
    out_at: int = 0  # misalignments
    piece_at: int = 0


class Answer(NamedTuple):
    """A Status of zstd.cu, and the output if there is no error."""

    error: int
    finished: int
    produced: int
    consumed: int
    content_size: int
    blocks: int
    sequences: int
    has_checksum: int
    checksum: int
    window_size: int
    output: bytes | None


def varied(
    frame: bytes,
    capacity: int,
    rng: random.Random,
    cuts: Sequence[int] | None = None,
    most: int = 12,
) -> Case:
    """A case whose pieces, launches and misalignments are random; half have a lane without work."""
    shape = rng.randrange(32) | rng.randrange(4) << 11
    cuts = cuts or random_cuts(len(frame), rng, most)
    return Case(frame, capacity, cuts, shape, rng.randrange(8), rng.randrange(8))


def decode(program: pathlib.Path, cases: Sequence[Case]) -> list[Answer]:
    source = bytearray()
    for frame, capacity, cuts, *rest in cases:
        source += struct.pack("<6I", len(frame), capacity, len(cuts), *rest)
        source += struct.pack(f"<{len(cuts)}I", *cuts) + frame
    done = subprocess.run([program], input=source, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[:6000]
    answers, at = [], 0
    for _ in cases:
        status = struct.unpack_from("<2I5Q2IQ", done.stdout, at)
        at += 64
        produced = status[2] if status[0] == 0 else 0
        answers.append(Answer(*status, None if status[0] else done.stdout[at : at + produced]))
        at += produced
    assert at == len(done.stdout)
    return answers


def assert_decodes(
    program: pathlib.Path, cases: Sequence[Case], datas: Sequence[bytes]
) -> list[Answer]:
    answers = decode(program, cases)
    for i, (answer, case, data) in enumerate(zip(answers, cases, datas, strict=True)):
        assert answer.error == 0 and answer.finished and answer.output == data, (i, answer[:-1])
        assert answer.consumed == len(case.frame), (i, answer[:-1])
    return answers


@pytest.fixture(scope="session")
def build(tmp_path_factory) -> Callable[..., pathlib.Path]:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler for zstd.cu")
    folder = tmp_path_factory.mktemp("zstd")
    (folder / "trivial.cpp").write_text("int main() { return 0; }\n")

    def build(name: str, *options: str, sanitizer: str = "") -> pathlib.Path:
        command = [compiler, "-std=c++17", "-g", "-fno-strict-aliasing", "-pthread", "-DFUZZ"]
        command += [*options, "-o", folder / name]
        if sanitizer:
            command += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
            if subprocess.run([*command, folder / "trivial.cpp"], capture_output=True).returncode:
                pytest.skip(f"the C++ compiler has no -fsanitize={sanitizer}")
        subprocess.run([*command, SOURCE], check=True)
        return folder / name

    return build


@pytest.fixture(scope="session")
def plain(build):
    return build("plain", "-O2", "-DBEHIND=64", *LARGE)


@pytest.fixture(scope="session")
def sanitized(build):
    return build("sanitized", "-O1", *SMALL, sanitizer="address,undefined")


# Good frames


@pytest.mark.parametrize("level", [-5, 1, 3, 9, 19])
def test_all_kinds_of_data(plain, level):
    """Whole and in pieces of many sizes, with the header's fields and without."""
    rng = random.Random(level)
    cases, datas, headers = [], [], []
    for data in kinds().values():
        both = rng.random() < 0.5
        for checksum, content_size in ((both, both), (not both, both)):
            frame = compress(data, level, checksum, content_size)
            size = len(frame)
            for cuts in ([size], every(size, 200 << 10), None):
                cases.append(varied(frame, len(data), rng, cuts))
                datas.append(data)
                check = int.from_bytes(frame[-4:], "little") if checksum else 0
                headers.append((checksum, check, len(data) if content_size else UNKNOWN))
    answers = assert_decodes(plain, cases, datas)
    assert [(a.has_checksum, a.checksum, a.content_size) for a in answers] == headers


def special_frames():
    """By unusual parameters of the compressor; with the data."""
    rng = random.Random(4)
    text = words(200_000, 11, 2000)
    parameters = [
        (19, {"min_match": 3}),
        (3, {"min_match": 3}),
        (19, {"min_match": 3, "window_log": 10}),
        (19, {"window_log": 27}),
        (1, {"window_log": 24, "enable_ldm": True}),
        (19, {"target_length": 4096}),
        (5, {"min_match": 7}),
        (9, {"window_log": 12}),
        (22, {"strategy": zstandard.STRATEGY_BTULTRA2, "min_match": 3}),
        (1, {"strategy": zstandard.STRATEGY_FAST, "min_match": 7}),
    ]
    names = ("words", "mixed", "steps", "sparse", "few", "bf16", "tiny 300")
    datas = [kinds()[name][-200_000:] for name in names]
    for level, options in parameters:
        for data in [*rng.sample(datas, 3), text]:
            yield compress(data, level, **options), data
    long = kinds()["bf16"] + rng.randbytes(3_000_000) + kinds()["bf16"] + kinds()["words"]
    yield compress(long, 1, window_log=23), long
    yield compress(long, 1, window_log=27, enable_ldm=True), long
    for data in datas:
        for level in (1, 3, 19):
            yield flushed(data, rng, level), data
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=len(text))
    parts = [compressor.compress(text[:1]), compressor.compress(text[1:]), compressor.flush()]
    yield b"".join(parts), text


def test_unusual_parameters(plain):
    rng = random.Random(5)
    cases, datas = [], []
    for frame, data in special_frames():
        for cuts in ([len(frame)], every(len(frame), 200 << 10), None):
            cases.append(varied(frame, len(data), rng, cuts, 60))
            datas.append(data)
    assert_decodes(plain, cases, datas)


def test_no_access_out_of_bounds(sanitized):
    """Good frames under the sanitizers, in pieces that fit the small limits there."""
    rng = random.Random(6)
    frames = [*special_frames()]
    for data in kinds().values():
        frames.append((compress(data, 1, rng.random() < 0.5, rng.random() < 0.5), data))
    frames = [(frame, data) for frame, data in frames if len(frame) <= 700_000]
    cases = []
    for frame, data in frames:
        cuts = sorted({*random_cuts(len(frame), rng), *every(len(frame), 50_000)})
        cases.append(varied(frame, len(data), rng, cuts))
    assert_decodes(sanitized, cases, [data for _, data in frames])


def test_threads_at_the_same_time(build, sanitized):
    """With the sanitizer that finds what threads do to each other."""
    races = build("races", "-O1", *SMALL, sanitizer="thread")
    rng = random.Random(9)
    parts = [kinds()["bf16"][:30_000], bytes(20_000), words(9000, 2), b"abc" * 2000, bf16(2000)]
    mixture = b"".join([*parts, kinds()["words"][:4000]])
    datas = [mixture, words(20_000, 3), kinds()["zeros"], kinds()["run"], b"12345678901" * 30_000]
    datas += [kinds()[name][:100_000] for name in ("random", "few", "bf16")]
    datas.append(kinds()["steps"][:20_000])
    frames = [(flushed(mixture, rng, level), mixture) for level in (1, 3)] + [*made_frames(8, 12)]
    for level in (1, 19):
        for data in datas:
            options = {"min_match": rng.choice([3, 5])}
            frame = compress(data, level, rng.random() < 0.5, rng.random() < 0.5, **options)
            frames.append((frame, data))
    cases = []
    for frame, data in frames:
        lanes, reverse = rng.randrange(4), rng.randrange(2)
        blocks, more = rng.choice([0, 1, 1, 2]), rng.choice([1, 2, 5])
        shape = blocks | rng.randrange(4) << 2 | reverse << 4 | 1 << 5
        shape |= more << 6 | lanes << 11
        case = varied(frame, len(data), rng, most=2)
        cases.append(case._replace(shape=shape, out_at=rng.choice([0, 0, 3])))
    datas = [data for _, data in frames]
    assert_decodes(races, cases, datas)
    assert_decodes(sanitized, cases[::2], datas[::2])


def test_byte_by_byte(sanitized):
    """Every piece is one byte."""
    rng = random.Random(7)
    datas = [data for name, data in kinds().items() if name.startswith("tiny")]
    datas += [words(2000), bf16(1000)]
    cases = []
    for data in datas:
        frame = compress(data, 3, checksum=rng.random() < 0.5, content_size=rng.random() < 0.5)
        cases.append(varied(frame, len(data), rng, every(len(frame), 1)))
    assert_decodes(sanitized, cases, datas)


pieces_of_data = st.one_of(
    st.binary(max_size=300),
    st.builds(bytes.__mul__, st.binary(min_size=1, max_size=1), st.integers(0, 140_000)),
    st.builds(bytes.__mul__, st.binary(min_size=1, max_size=40), st.integers(0, 4000)),
    st.builds(bf16, st.integers(0, 70_000), st.integers(0, 9)),
    st.builds(random.Random.randbytes, st.builds(random.Random), st.integers(0, 140_000)),
    st.builds(words, st.integers(0, 30_000), st.integers(0, 5), st.integers(1, 500)),
    st.builds(
        lambda size, seed, bits: bytes(b >> bits for b in random.Random(seed).randbytes(size)),
        st.integers(0, 20_000),
        st.integers(0, 9),
        st.integers(0, 7),
    ),
)


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),  # type: ignore  its metaclass
)
@given(
    st.lists(pieces_of_data, max_size=6).map(b"".join),
    st.integers(-7, 19),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
    st.sampled_from(["flushed", "short matches", "", ""]),
)
def test_any_data(plain, data, level, checksum, content_size, seed, how):
    rng = random.Random(seed)
    if how == "flushed":
        data = data[:60_000]
        frame = flushed(data, rng, level, checksum=checksum)
    else:
        options = {"min_match": 3} if how else {}
        frame = compress(data, level, checksum, content_size, **options)
    assert_decodes(plain, [varied(frame, len(data), rng)], [data])


def test_made_frames(sanitized):
    """What the format allows and no compressor writes."""
    rng = random.Random(13)
    frames = [*made_frames(120, 21)]
    cases = [varied(frame, len(data), rng) for frame, data in frames]
    assert_decodes(sanitized, cases, [data for _, data in frames])
    theirs = [reference(frame, len(data))[0] for frame, data in frames]
    known = [pair for pair in zip(theirs, frames, strict=True) if pair[0] is not None]
    assert all(output == data for output, (_, data) in known)
    assert len(known) > 0.9 * len(frames)


def test_many_sequences(plain):
    """So many in a block that their number takes three bytes."""
    found = 0
    for seed in range(40):
        maker = Maker(random.Random(seed), many=33_000)
        frame, data = maker.frame(), bytes(maker.output)
        (answer,) = assert_decodes(plain, [Case(frame, len(data), [len(frame)])], [data])
        if answer.sequences > 0x7F00:
            assert reference(frame, len(data))[0] == data
            found += 1
        if found == 2:
            return
    raise AssertionError("none made")


# Frames that end otherwise than they should


def test_what_follows_a_frame(plain):
    data = words(50_000)
    frame = compress(data)
    size = len(frame)
    for tail in (b"x", frame, bytes(100_000)):
        end = size + len(tail)
        cuts = [[end], [size, end], sorted({100, size - 1, size + 1, end})]
        for answer in decode(plain, [Case(frame + tail, len(data), some) for some in cuts]):
            assert answer.error == 0 and answer.finished and answer.output == data
            assert answer.consumed == size


@pytest.mark.parametrize("content_size", [True, False])
def test_cut_off_and_no_room(plain, content_size):
    data = words(50_000)
    frame, checked = (compress(data, 1, check, content_size) for check in (False, True))
    whole = [len(frame)]
    cases = [Case(frame, len(data) - 1, whole), Case(frame, len(data) + 1000, whole)]
    cut = [frame[:size] for size in (1, 4, 5, 8, 1000, len(frame) - 1)] + [checked[:-1]]
    cases += [Case(some, len(data), [len(some)]) for some in cut]
    answers = decode(plain, cases)
    assert answers[1].output == data
    assert [answer.error for answer in answers] == [13, 0, *([12] * len(cut))]


def test_limits(build):
    """What does not fit the pools is unsupported."""
    program = build("tiny", "-O1", *TINY, sanitizer="address,undefined")
    rng = random.Random(8)
    many = flushed(words(30_000), rng, 1)
    few = compress(words(400), 3)
    pooled = compress(words(100_000), 3)
    blocks = flushed(rng.randbytes(60_000), rng, 1)
    cases = [
        Case(many, 30_000, [len(many)]),
        Case(few, 400, [len(few)]),
        Case(pooled, 100_000, [len(pooled)]),
        Case(blocks, 60_000, every(len(blocks), 100)),
    ]
    errors = [answer.error for answer in decode(program, cases)]
    assert errors[0] == 67 and errors[1] in (0, 68) and errors[2] == 68 and errors[3] in (0, 67)


def test_other_frames(plain):
    """Skippable ones, such as need a dictionary, and what is no frame."""
    raw = zstandard.ZstdCompressionDict(words(5000), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    trained = zstandard.train_dictionary(2000, [words(500, i) for i in range(50)])
    reserved = bytearray(compress(b"hello" * 10))
    reserved[4] |= 8
    frames = {
        struct.pack("<II", 0x184D2A53, 4) + b"abcd" + compress(b"hello"): 65,
        b"not zstd at all": 1,
        zstandard.ZstdCompressor(dict_data=trained).compress(words(300, 3)): 64,
        # Without an identifier it is not seen, but matches begin before the output.
        zstandard.ZstdCompressor(dict_data=raw, level=19).compress(words(5000)[3000:3900]): 10,
        bytes(reserved): 2,
    }
    answers = decode(plain, [Case(frame, 1000, [len(frame)]) for frame in frames])
    assert [answer.error for answer in answers] == list(frames.values())


# Damaged frames


def test_bad_offsets(sanitized):
    """Frames with nothing wrong but an offset: 0, or behind the output's beginning."""
    rng = random.Random(14)
    cases = []
    while len(cases) < 60:
        maker = Maker(rng, evil=0.3)
        frame, size = maker.frame(), len(maker.output)
        if maker.broken and size < 500_000:
            assert reference(frame, size)[0] is None
            cases.append(varied(frame, size, rng))
    for answer in decode(sanitized, cases):
        assert answer.error in (4, 5, 6, 10)  # trees and streams are bad now and then, too


def test_deep_trees(sanitized):
    """Codes of more than 11 bits, and fewer than 6 literals in four streams."""
    rng = random.Random(15)
    cases, datas = [], []
    while len(cases) < 120:
        maker = Maker(rng, evil=0.5)
        frame, size = maker.frame(), len(maker.output)
        if not maker.broken and size < 500_000:
            cases.append(varied(frame, size, rng))
            datas.append(bytes(maker.output))
    answers = decode(sanitized, cases)
    for answer, data in zip(answers, datas, strict=True):
        assert answer.error in (0, 4, 5)
        assert answer.error or answer.output == data
    errors = [answer.error for answer in answers]
    assert errors.count(4) > 10 and errors.count(5) > 10


def four_streams(tree: bytes, rest: bytes) -> bytes:
    """A block of 6 literals and no sequences."""
    header = 2 | 1 << 2 | 6 << 4 | (len(tree) + len(rest)) << 14
    return header.to_bytes(3, "little") + tree + rest + b"\0"


def test_blocks_written_by_hand(sanitized):
    """Blocks at the very end of what is staged, which promise more than there is."""
    rng = random.Random(17)
    one = b"\x08a\x01\x54\x01\x00\x00\x01"  # a literal, and 3 more by the match
    good = [one, four_streams(b"\x80\x10", struct.pack("<3H", 1, 1, 1) + b"\x04\x05\x06\x01")]
    bad = [one[:3] + bytes([0x54 | reserved]) + one[4:] for reserved in (1, 2, 3)]
    bad += [one[:size] for size in range(1, len(one))]
    bad.append(b"\x08a\x01\x54\x23\0\0\0\0\x01")  # 65536 literals by the sequence
    bad.append(
        (3 | 1 << 4 | 1 << 14).to_bytes(3, "little") + b"\x02\0"
    )  # the tree before the first
    bad += [b"\x08a\x01" + bytes([3 << shift]) + b"\0\0\x01" for shift in (6, 4, 2)]  # the table
    for room in range(9):
        bad += [four_streams(tree, bytes(room)) for tree in (b"\x80\x10", b"\x82\x11\x10")]
    ones = BitWriter()  # a distribution of one probability of 0, and then zeros without end
    ones.put(0, 4)
    ones.put(1, 5)
    ones.put((1 << 800_000) - 1, 800_000)
    endless = ones.forwards()
    for shift in (6, 4, 2):
        bad.append(b"\0\x01" + bytes([2 << shift | 0x54 & ((1 << shift) - 1)]) + endless)
    large = (2 | 3 << 2 | 6 << 4 | 120_000 << 22).to_bytes(5, "little")
    bad.append(large + b"\x7f" + endless[:100_000] + bytes(25_000))
    cut = 0
    while cut < 16:  # distributions whose last byte is 0, without it: right, but not there
        accuracy = rng.randint(5, 8)
        whole = describe(random_distribution(rng, range(20), accuracy), accuracy)
        if whole[-1] == 0:
            bad.append(b"\0\x01\xa8" + whole[:-1])
            cut += 1
    frames = [one_block(content) for content in good + bad]
    cases = [Case(f, 1000, [len(f)], piece_at=i % 8) for i, f in enumerate(frames)]
    for i, (answer, case) in enumerate(zip(decode(sanitized, cases), cases, strict=True)):
        expected, _ = reference(case.frame, 1000)
        assert (expected is None) == (i >= len(good)), i
        assert answer.error in ((0,) if i < len(good) else (4, 5, 6, 7, 8, 9)), (i, answer)
        assert answer.output == expected


def test_blocks_too_large(sanitized):
    head = struct.pack("<IBB", zstandard.MAGIC_NUMBER, 0, 9 << 3)
    cases = []
    for kind, size in ((0, (1 << 21) - 1), (2, 131_073), (1, 131_073), (3, 10)):
        frame = head + (size << 3 | kind << 1 | 1).to_bytes(3, "little") + bytes(3_000_000)
        for cut in (9, 100, 131_000, 131_081, 1_000_000):  # in the first, not all of the block
            cases.append(Case(frame, 3_000_000, [cut, len(frame)]))
    frame = head[:5] + b"\0" + (1025 << 3 | 1).to_bytes(3, "little") + bytes(1025)
    cases.append(Case(frame, 2000, [len(frame)]))  # more than the window
    assert {answer.error for answer in decode(sanitized, cases)} == {3}


def test_every_truncation(sanitized):
    """Blocks cut off at every place, at the very end of what is staged."""
    cases = []
    for frame, data in made_frames(16, 41):
        for at, length in blocks_of(frame):
            for cut in range(min(length, 250)):
                header = (cut << 3 | 5).to_bytes(3, "little")
                end = at + 3 + cut
                some = frame[:at] + header + frame[at + 3 : end]
                cases.append(Case(some, len(data), [end], 0, 0, len(cases) % 8))
    random.Random(16).shuffle(cases)
    for answer, case in zip(decode(sanitized, cases), cases, strict=True):
        if answer.error == 0:
            assert answer.output == reference(case.frame, case.capacity)[0]


def check_damaged(program: pathlib.Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    cases = [varied(*damaged, rng, most=4) for damaged in damaged_frames(count, rng)]
    same = refused = 0
    for i, (answer, case) in enumerate(zip(decode(program, cases), cases, strict=True)):
        expected, complaint = reference(case.frame, case.capacity)
        if answer.error == 0:
            same += 1
            assert answer.finished
            if expected is None:
                assert "checksum" in complaint, (seed, i, complaint)
            elif expected or zstandard.get_frame_parameters(case.frame).content_size:
                assert answer.output == expected, (seed, i)
        elif expected is not None:
            refused += 1
    print(f"seed {seed}: {count} frames, {same} decoded, {refused} refused only by zstd.cu")
    assert refused < count / 10, seed


def test_damaged(sanitized):
    """Decoded as zstandard does, or refused: always the same ones, or new ones for a time."""
    seconds = float(os.environ.get("JAXGDS_FUZZ_SECONDS", "0"))
    for seed in () if seconds else (1, 2):
        check_damaged(sanitized, seed, 1500)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_damaged(sanitized, random.getrandbits(64), 1500)
