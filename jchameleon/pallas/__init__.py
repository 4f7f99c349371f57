"""Device operations that gather KV blocks and adapters out of one page pool.

Each operation has one signature and, so far, two bodies: a reference in plain
`jax.numpy` (`reference.py`) and a fast XLA path for CPU (one module per operation).
The `gpu_*` modules are Pallas kernels that the engine does not use yet.

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
