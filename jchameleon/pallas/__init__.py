"""Device operations that gather KV blocks and adapters out of one page pool.

Each operation has one signature and several bodies: a reference in plain `jax.numpy`
(`reference.py`), XLA (one module per operation), loops compiled for CPUs (`cpu_*`) and
Pallas kernels for NVIDIA GPUs (`gpu_*`). `operations.py` chooses among them.

Glossary of the shape comments, here and in `models` and `runtime`:

  T   tokens of a step            D   model width
  R   rows (requests) of a step   F   MLP width
  H   query heads                 KVH key/value heads
  HD  head width                  G   query heads per KV head, H / KVH
  P   pages of a layer's pool     E   elements of a page
  BT  tokens of a KV block        NB  KV blocks a request may hold
  NT  query tiles of a step       TQ  tokens of a query tile (1 in decode)
  N   output features             V   vocabulary
  L   layers                      W   pages of a LoRA chunk
  NW  work items of the LoRA list CG  chunks of a work item
  RB  row blocks of the GPU's LoRA lists      C   chunks in their page table

Activations are feature-major, `f[D, T]`: with weights stored `[out, in]` a product is
`weight @ x`, which XLA:CPU runs up to 1.6x faster at 8-32 tokens than `x @ weight.T`
(SmolLM2-135M shapes, 2 cores with AVX2, jax 0.10.2).
"""
