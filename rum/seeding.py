"""Independent random streams from one seed, by counter: nothing has to be saved to resume them."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Hashes `parts` (a seed and what the stream is for) to an integer in [0, 2**63)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
