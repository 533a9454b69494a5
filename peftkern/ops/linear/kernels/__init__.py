"""The linears' Triton kernels; `low_rank_calls.py` and `matmul_calls.py` launch them."""
