"""Nine damages of a tar of which webdataset names three, done to samples of a picture or latent, then `txt`."""

from collections.abc import Callable

from ldm_scale.data.tar import BLOCK


def at(tar: bytes, member: str) -> int:
    """Where a member's header begins."""
    return tar.index(member.encode() + bytes(100 - len(member)))


def with_size(tar: bytes, member: str, size: bytes) -> bytes:
    """A header that lies about its member's length and has a checksum that fits."""
    begin = at(tar, member)
    block = bytearray(tar[begin : begin + BLOCK])
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tar[:begin] + bytes(block) + tar[begin + BLOCK :]


def flipped(tar: bytes, place: int) -> bytes:
    return tar[:place] + bytes([tar[place] ^ 1]) + tar[place + 1 :]


def _zeroed(tar: bytes, place: int) -> bytes:
    return tar[:place] + bytes(BLOCK) + tar[place + BLOCK :]


def _without_end(tar: bytes) -> bytes:
    content = tar.rstrip(b"\0")
    return content + bytes(-len(content) % BLOCK)


DAMAGES: dict[str, Callable[[bytes, str], bytes]] = {
    "cut at a member boundary": lambda tar, member: tar[: at(tar, member)],
    "cut inside a header": lambda tar, member: tar[: at(tar, member) + 200],
    "cut inside a content": lambda tar, member: tar[: at(tar, member) + 600],
    "cut before the caption": lambda tar, member: tar[: at(tar, f"{member[:-4]}.txt")],
    "end blocks lost": lambda tar, member: _without_end(tar),
    "zeroed header": lambda tar, member: _zeroed(tar, at(tar, member)),
    "damaged size": lambda tar, member: with_size(tar, member, b"00000005670\0"),
    "flipped bit in a header": lambda tar, member: flipped(tar, at(tar, member) + 130),
    "flipped bit in a content": lambda tar, member: flipped(tar, at(tar, member) + BLOCK),
}
"""What each does to a tar, at the first member of a sample."""

FOUND = {
    "cut at a member boundary": ("no_end_blocks", 5),
    "cut inside a header": ("truncated", 5),
    "cut inside a content": ("truncated", 5),
    "cut before the caption": ("no_end_blocks", 5),
    "end blocks lost": ("no_end_blocks", 10),
    "zeroed header": ("damaged_header", 9),
    "damaged size": ("damaged_size", 8),
    "flipped bit in a header": ("damaged_header", 9),
    "flipped bit in a content": ("unreadable", 9),
}
"""What a reader without an index says, and how many of ten samples are whole, where it happened at `000005.png`."""
