"""The same numbers sooner: packed weights, compiled kernels, steps of many prompts at once, recorded steps.

Everything here has a plain counterpart that tests hold it to, values and gradients, and steps aside where it cannot
serve. Whoever wants to know what an embedding is need not enter; docs/performance.md says what it buys.

* weights: `packed_weights`, `packed_linear`, `frozen_linear`, `int8`, `inference_copy`
* steps: `grouped_steps`, `kernel_steps`, `whole_steps`, `kernel_prompts`; in training `trained_steps`; on a GPU
  `step_graphs`
* kernels: `step_kernels` calls what ``kernels/`` is compiled to; on a GPU `fused_soft_token`, `soft_token_kernels`
* what lies between: `norms`, `module_walk`, `kernel_caches`
"""
