"""How many heads an attention has, where nobody says and where somebody does."""

from opsin.errors import BadInput


def heads_of(dim: int, num_heads: int | None = None) -> int:
    """The number of heads; by default dim // 32, or the nearest number that divides dim (of two, the larger).

    Raises BadInput where a given number is below 1 or does not divide the channels.
    """
    if num_heads is None:
        divisors = (heads for heads in range(1, dim + 1) if dim % heads == 0)
        return min(divisors, key=lambda heads: (abs(heads - dim // 32), -heads), default=1)
    if num_heads < 1 or dim % num_heads:
        raise BadInput(f"num_heads={num_heads} does not divide the {dim} channels; take a divisor of {dim}")
    return num_heads
