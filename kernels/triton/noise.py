"""The Gumbel noise of `reference_sampling`, bit for bit up to the last logarithm, as functions for other kernels.

About 12 integer and 30 float operations a token id, no memory. The logarithm is a polynomial: the hardware's
approximation is off by 2^-22 near one, and there, at u close to 1, the noise decides the draw.
"""

import triton
import triton.language as tl


@triton.jit
def mix(h):
    """MurmurHash3's finaliser of uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def noise_keys(seed, position):
    """seed, position int64 -> the two uint32 keys of a draw."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    word = position.to(tl.uint32)
    key0 = mix(word ^ mix(low ^ mix(high ^ 0x9E3779B9)))
    key1 = mix(word + mix(high ^ mix(low ^ 0x7F4A7C15)))
    return key0, key1


@triton.jit
def log(x):
    """Natural logarithm of positive normal float32, relative error under 2e-7 (the polynomial of Cephes' logf)."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # sqrt(1/2): the mantissa is taken from [sqrt(1/2), sqrt(2))
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    p = p * f * square + exponent * -2.12194440e-4 - 0.5 * square
    return f + p + exponent * 0.693359375


@triton.jit
def gumbel(token_id, key0, key1):
    """token_id int32 [n] -> float32 [n]."""
    x = mix(mix(token_id.to(tl.uint32) ^ key0) ^ key1)
    u = ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -log(-log(u))
