"""What the DiT attends to: rotary positions, mask predicates, scaled dot-product attention, and the K/V cache.

- RoPE as Wan2.1: three axes (frame, row, column), interleaved pairs, tables computed in float64.
- Masks are predicates on chunk numbers, mask(q_chunk, k_chunk) -> bool; `mask_matrix` is their dense picture.
- `masked_attention` never builds that picture: it gathers the keys a chunk may see and attends without a mask.
- `KVCache` holds chunk 0 and the previous chunk, and nothing else: memory is constant however long the stream.
"""

import weakref
from functools import lru_cache

import torch
import torch.nn.functional as F

from .config import UserError

WINDOW = 21                                  # latent frames of a training clip; no RoPE index is ever above 20


# Rotary positions

def rope_dims(head_dim):
    """How a head is divided among (frame, row, column): 44/42/42 at 128 (Wan2.1)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _angles(positions, dim, theta=10000.0):
    freqs = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.as_tensor(positions, dtype=torch.float64), freqs)          # (P, dim / 2)


@lru_cache(maxsize=64)
def _rope_table(frames, rows, columns, head_dim, device):
    # Normal tensors even when first asked for inside inference_mode: training reuses the same table later.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        dims = rope_dims(head_dim)
        shape = (len(frames), rows, columns, -1)
        f = _angles(frames, dims[0])[:, None, None].expand(shape)
        r = _angles(range(rows), dims[1])[None, :, None].expand(shape)
        c = _angles(range(columns), dims[2])[None, None].expand(shape)
        angles = torch.cat([f, r, c], dim=-1).flatten(0, 2)                              # (L, D / 2)
        return torch.stack([angles.cos(), angles.sin()]).float().to(device)              # (2, L, D / 2)


def rope_table(frames, rows, columns, head_dim, device="cpu"):
    """cos and sin for tokens ordered (frame, row, column): float32 (2, L, D/2). `frames`: latent frame indices (F,)."""
    frames = frames.tolist() if isinstance(frames, torch.Tensor) else frames
    return _rope_table(tuple(frames), rows, columns, head_dim, torch.device(device))


def apply_rope(x, table):
    """Turn each interleaved pair of x (B, N, L, D) by its angle; computed in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))                                             # (B, N, L, D / 2, 2)
    if torch.compiler.is_compiling():                        # compilers know no complex numbers
        return (mirrored if x.is_cuda else stacked)(pairs, *table).type_as(x).flatten(-2)
    turned = torch.view_as_complex(pairs) * torch.complex(*table)        # same numbers in one pass, four times faster
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def stacked(pairs, cos, sin):
    """Both entries of each pair turned, then put together: what a compiler vectorises on a CPU."""
    a, b = pairs.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)


def mirrored(pairs, cos, sin):
    """The same, each entry from itself and its mirror: on a GPU one kernel with the norm before it, in x's layout, which attention keeps."""
    sign = 2 * torch.arange(2, device=pairs.device) - 1
    return pairs * cos[..., None] + pairs.flip(-1) * (sin[..., None] * sign)


# Mask predicates: may a query of chunk q see a key of chunk k? They take ints or integer tensors.

def bidirectional(q, k):
    """Everything sees everything: the teacher."""
    return (q == q) & (k == k)


def causal(q, k):
    """All chunks up to one's own: CausVid, Self-Forcing."""
    return k <= q


def sparse_causal(q, k):
    """Chunk 0 (the reference), the previous chunk and one's own: the TalkingMachines student."""
    return (k == 0) | (k == q - 1) | (k == q)


def first(q, k):
    """Half of it, to see what the other is for: chunk 0 and one's own."""
    return (k == 0) | (k == q)


def previous(q, k):
    """The other half: the previous chunk and one's own."""
    return (k == q - 1) | (k == q)


STREAMED = ("sparse_causal", "first", "previous")
MASKS = {"bidirectional": bidirectional, "causal": causal, "sparse_causal": sparse_causal, "first": first, "previous": previous}


def mask_matrix(kind, frames, tokens_per_frame=1, chunk=3, device=None):
    """The dense mask, bool (L, L) with rows for queries and L = frames * tokens_per_frame; True = may attend."""
    chunk_of = torch.arange(frames, device=device).repeat_interleave(tokens_per_frame) // chunk
    return predicate(kind)(chunk_of[:, None], chunk_of[None, :])


def predicate(kind):
    """The mask predicate of that name; UserError for an unknown one."""
    if kind not in MASKS:
        raise UserError(f"attention mask {kind!r} is unknown; choose one of {', '.join(MASKS)}")
    return MASKS[kind]


# Attention

long_attention, LONG = None, 1024            # a kernel for more keys than that, instead of torch's: see `kernels.use_attention`


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v for q (B, N, L, D) and k, v (B, N, L', D); mask: bool, True = may attend."""
    if long_attention is not None and mask is None and k.shape[2] > LONG:
        return long_attention(q, k, v)
    if torch.is_autocast_enabled("cpu"):                     # its gradient takes three times as long in bfloat16
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).type_as(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def masked_attention(q, k, v, kind, frames, chunk):
    """Self-attention of a full sequence (B, N, frames * S, D) under the mask `kind`, chunk by chunk.

    Equal to `attention` with the dense `mask_matrix`, but a chunk meets only the keys that it may see, and no L x L mask
    is ever made: with 7 chunks, sparse-causal is 2.7 times fewer products. The last chunk may be shorter.
    """
    visible = predicate(kind)
    if kind == "bidirectional":
        return attention(q, k, v)
    q, k, v = (x.split(chunk * (x.shape[2] // frames), dim=2) for x in (q, k, v))        # chunks of (B, N, L, D)
    out = []
    for c, q_c in enumerate(q):
        seen = [s for s in range(len(q)) if visible(c, s)]
        out.append(attention(q_c, torch.cat([k[s] for s in seen], dim=2), torch.cat([v[s] for s in seen], dim=2)))
    return torch.cat(out, dim=2)                                                         # (B, N, frames * S, D)


# The cache of a stream

@torch.no_grad()
def store(room, k, v):
    """A chunk's keys and values (B, N, L, D) into their `KVCache.room`. Once per layer, then `KVCache.advance`."""
    if room is not None:
        room[0].copy_(k)
        room[1].copy_(v)


class KVCache:
    """Keys and values of chunk 0 (slot 0) and of the previous chunk (slot 1), for every layer, in static buffers; `mask` says which are seen.

    k, v: (layers, B, N, 2, L, D) with L the tokens of one chunk. Keys are stored *before* RoPE, since the previous
    chunk's position changes (p, then p - chunk) and no index may ever pass WINDOW - 1. Writes are detached: a context
    is a constant to the chunk that reads it. `filled` counts chunks written and is a plain int, not a device tensor.

    writes_to: the cache that a forward pass fills: itself, another cache, or None to only read.
    memo: results that do not change from chunk to chunk (text and image K/V, time modulation), see `remember`; one dict
    serves the caches of all denoising steps.
    """

    def __init__(self, layers, batch, heads, tokens, head_dim, chunk, window=WINDOW, device=None, dtype=None, memo=None, mask="sparse_causal"):
        if mask not in STREAMED:
            raise UserError(f"attention mask {mask!r} is none that a stream can keep, whose cache holds chunk 0 and the previous one; choose one of {', '.join(STREAMED)}")
        self.sees = predicate(mask)
        self.k = torch.zeros(layers, batch, heads, 2, tokens, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.chunk, self.window, self.filled = chunk, window, 0
        self.writes_to = self
        self.memo = {} if memo is None else memo

    @property
    def writes_to(self):
        return self._writes_to and self._writes_to()

    @writes_to.setter
    def writes_to(self, cache):
        # Weak: a cache that writes to itself would outlive its chain until Python looks for cycles, and large ones fit a card once only.
        self._writes_to = cache and weakref.ref(cache)

    def fits(self, batch, tokens):
        """Whether chunks of `tokens` tokens in batches of `batch` go in here."""
        return (batch, tokens) == (self.k.shape[1], self.k.shape[4])

    def positions(self):
        """RoPE indices of the next chunk: 0.., chunk.., and for ever `window - chunk`.. once the window is full."""
        first = min(self.filled * self.chunk, self.window - self.chunk)
        return range(first, first + self.chunk)

    def seen(self):
        """The slots that the next chunk sees, a slice: of chunk 0 and the previous one what is there and the mask allows."""
        slots = [slot for slot, chunk in enumerate((0, self.filled - 1)[: self.filled]) if self.sees(self.filled, chunk)]
        return slice(slots[0], slots[-1] + 1) if slots else slice(0)

    def context_positions(self, positions):
        """RoPE indices of the keys already here, for a chunk at `positions`: chunk 0 at 0.., the previous just before."""
        start = int(positions[0])
        slots = [range(self.chunk), range(start - self.chunk, start)][self.seen()]
        return [p for slot in slots for p in slot]

    def read(self, layer):
        """The context's keys and values, (B, N, 0 | L | 2 L, D): views, not copies."""
        return tuple(x[layer, :, :, self.seen()].flatten(2, 3) for x in (self.k, self.v))

    def room(self, layer):
        """Where this chunk's keys and values go, (B, N, L, D) each, by `writes_to`: views, see `store`; None: nowhere."""
        if self.writes_to is None:
            return None
        slot = min(self.writes_to.filled, 1)
        return tuple(x[layer, :, :, slot] for x in (self.writes_to.k, self.writes_to.v))

    def advance(self):
        """A forward pass is over: the stored chunk becomes context."""
        if self.writes_to is not None:
            self.writes_to.filled += 1

    def remember(self, key, source, compute, keep=1):
        """compute(source), reused while the same tensor object comes as `source`; never reused when gradients are on.

        Do not change `source` in place. Each key keeps its last `keep` results, so nothing grows.
        """
        if torch.is_grad_enabled():
            return compute(source)
        entries = self.memo.setdefault(key, [])
        for known, value in entries:
            if known is source:
                return value
        entries.append((source, compute(source)))
        del entries[:-keep]
        return entries[-1][1]

    def saved(self):
        """A copy of what may still change: how many chunks were written, and slot 1. Chunk 0 stays where it is."""
        return self.filled, [x[:, :, :, 1].clone() for x in (self.k, self.v)] if self.filled > 1 else []

    def restore(self, saved):
        """Back to where `saved` was called."""
        self.filled, slots = saved
        for x, slot in zip((self.k, self.v), slots):
            x[:, :, :, 1].copy_(slot)
