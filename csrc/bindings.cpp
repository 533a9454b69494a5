// pybind11 over the C ABI: argument passing only. Pointers arrive as integers from checked launchers, which hold the tensors; 0 is null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "include/peftkern.h"

namespace py = pybind11;
using Address = uintptr_t;

template <typename T>
static T* at(Address p) { return reinterpret_cast<T*>(p); }

static void check(int status) {
  if (status != PK_OK) throw std::invalid_argument(std::string("peftkern native call: ") + pk_status_string(status));
}

struct Weight : pk_weight {
  Weight(Address data, Address code, Address absmax, Address absmax_8bit, Address absmax_code, Address nested_absmax, Address absmax_offset, int64_t n,
         int64_t k, int blocksize, int nested_blocksize, int dtype)
      : pk_weight{at<void>(data), at<float>(code), at<float>(absmax), at<uint8_t>(absmax_8bit), at<float>(absmax_code), at<float>(nested_absmax),
                  at<float>(absmax_offset), n, k, blocksize, nested_blocksize, dtype} {}
};

struct Lora : pk_lora {
  Lora(Address a, Address b, int64_t r, int dtype, float scaling, uint32_t threshold, Address seed)
      : pk_lora{at<void>(a), at<void>(b), r, dtype, scaling, threshold, seed ? *at<uint64_t>(seed) : 0} {}
};

PYBIND11_MODULE(_C, m) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.attr("abi_version") = pk_abi_version();
  m.def("isa", [] { return std::string(pk_isa()); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (int i = 0; pk_isa_name(i); i++) names.push_back(pk_isa_name(i));
    return names;
  });
  m.def("set_isa", [](const std::string& name) { check(pk_set_isa(name.c_str())); });

  py::class_<Weight>(m, "Weight").def(py::init<Address, Address, Address, Address, Address, Address, Address, int64_t, int64_t, int, int, int>());
  py::class_<Lora>(m, "Lora").def(py::init<Address, Address, int64_t, int, float, uint32_t, Address>());

  m.def("quantize_4bit", [](Address w, int dtype, int64_t numel, int blocksize, Address code, Address packed, Address absmax) {
    check(pk_quantize_4bit_cpu(at<void>(w), dtype, numel, blocksize, at<float>(code), at<uint8_t>(packed), at<float>(absmax), 0));
  }, nogil());
  m.def("quantize_absmax", [](Address absmax, int64_t count, int blocksize, Address code, Address out, Address nested) {
    check(pk_quantize_absmax_cpu(at<float>(absmax), count, blocksize, at<float>(code), at<uint8_t>(out), at<float>(nested), 0));
  }, nogil());
  m.def("dequantize_4bit", [](const Weight& w, int64_t row, int64_t rows, int64_t col, int64_t cols, Address out, int dtype) {
    check(pk_dequantize_4bit_cpu(&w, row, rows, col, cols, at<void>(out), dtype, 0));
  }, nogil());
  m.def("scratch_bytes", [](int64_t m_, int64_t n, int64_t k, int64_t r) { return pk_qlora_linear_scratch_bytes(m_, n, k, r, 0); });
  m.def("lora_scratch_bytes", [](int64_t m_, int64_t n, int64_t k, int64_t r) { return pk_lora_scratch_bytes(m_, n, k, r, 0); });
  m.def("qlora_linear_fwd", [](const Weight& w, const Lora& lora, Address x, int dtype, int64_t m_, Address bias, int bias_dtype, Address y, Address xa,
                               bool gemv, Address scratch, int64_t bytes) {
    check(pk_qlora_linear_fwd_cpu(&w, &lora, at<void>(x), dtype, m_, at<void>(bias), bias_dtype, at<void>(y), at<float>(xa), gemv, at<void>(scratch), bytes, 0));
  }, nogil());
  m.def("qlora_linear_bwd", [](const Weight& w, const Lora& lora, Address dy, Address x, int dtype, int64_t m_, Address xa, Address dyb, Address dx, Address d_a,
                               Address d_b, Address d_bias, Address scratch, int64_t bytes) {
    check(pk_qlora_linear_bwd_cpu(&w, &lora, at<void>(dy), at<void>(x), dtype, m_, at<float>(xa), at<float>(dyb), at<void>(dx), at<void>(d_a), at<void>(d_b),
                                  at<float>(d_bias), at<void>(scratch), bytes, 0));
  }, nogil());
  m.def("lora_fwd", [](const Lora& lora, Address x, int dtype, int64_t m_, int64_t n, int64_t k, Address bias, int bias_dtype, Address y, Address xa,
                       Address scratch, int64_t bytes) {
    check(pk_lora_fwd_cpu(&lora, at<void>(x), dtype, m_, n, k, at<void>(bias), bias_dtype, at<void>(y), at<float>(xa), at<void>(scratch), bytes, 0));
  }, nogil());
  m.def("lora_bwd", [](const Lora& lora, Address dy, Address x, int dtype, int64_t m_, int64_t n, int64_t k, Address xa, Address dyb, Address dx, Address d_a,
                       Address d_b, Address d_bias, Address scratch, int64_t bytes) {
    check(pk_lora_bwd_cpu(&lora, at<void>(dy), at<void>(x), dtype, m_, n, k, at<float>(xa), at<float>(dyb), at<void>(dx), at<void>(d_a), at<void>(d_b),
                          at<float>(d_bias), at<void>(scratch), bytes, 0));
  }, nogil());
  m.def("dropout_mask", [](int64_t m_, int64_t k, uint32_t threshold, Address seed, Address mask) {
    check(pk_dropout_mask_cpu(m_, k, threshold, *at<uint64_t>(seed), at<float>(mask), 0));
  }, nogil());
  m.def("cross_entropy", [](Address logits, int dtype, int64_t m_, int64_t n, int64_t width, Address bias, Address labels, Address row_scale, float softcap,
                            float label_smoothing, float z_loss, Address loss, bool gradient) {
    check(pk_cross_entropy_cpu(at<void>(logits), dtype, m_, n, width, at<float>(bias), at<int64_t>(labels), at<float>(row_scale), softcap, label_smoothing,
                               z_loss, at<float>(loss), gradient, 0));
  }, nogil());
}
