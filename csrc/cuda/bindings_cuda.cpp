// pybind11 over the CUDA C ABI: argument passing only.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "../bindings.h"
#include "../include/peftkern_cuda.h"

namespace py = pybind11;

namespace {

void check(int status) {
  if (status == PK_OK) return;
  const std::string words = std::string("peftkern CUDA call: ") + pk_cuda_status_string(status);
  if (status == PK_ERR_CUDA) throw std::runtime_error(words + ": " + pk_cuda_error_text());
  throw std::invalid_argument(words);
}

struct Lora : pk_lora {
  Lora(Address a, Address b, int64_t r, int dtype, float scaling)
      : pk_lora{at<void>(a), at<void>(b), r, dtype, scaling, 0, 0} {}
};

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.attr("abi_version") = pk_cuda_abi_version();
  m.attr("architectures") = PK_CUDA_ARCHS;
  m.def("versions", [] {
    int driver = 0, runtime = 0;
    check(pk_cuda_versions(&driver, &runtime));
    return std::make_pair(driver, runtime);
  });

  // Local: the CPU module has classes of these names too.
  py::class_<Weight>(m, "Weight", py::module_local())
      .def(py::init<Address, Address, Address, Address, Address, Address, Address, int64_t, int64_t, int, int,
                    int>());
  py::class_<Lora>(m, "Lora", py::module_local()).def(py::init<Address, Address, int64_t, int, float>());

  m.def(
      "dequantize_4bit",
      [](const Weight& w, int64_t row, int64_t rows, int64_t col, int64_t cols, Address out, int64_t ld_out,
         int dtype, Address stream, int device) {
        check(pk_dequantize_4bit_cuda(&w, row, rows, col, cols, at<void>(out), ld_out, dtype,
                                      at<void>(stream), device));
      },
      nogil());
  m.def(
      "quantize_4bit",
      [](Address w, int dtype, int64_t numel, int blocksize, Address code, Address packed, Address absmax,
         Address stream, int device) {
        check(pk_quantize_4bit_cuda(at<void>(w), dtype, numel, blocksize, at<float>(code),
                                    at<uint8_t>(packed), at<float>(absmax), at<void>(stream), device));
      },
      nogil());
  m.def(
      "quantize_absmax",
      [](Address absmax, int64_t count, int blocksize, Address code, Address out, Address nested,
         Address stream, int device) {
        check(pk_quantize_absmax_cuda(at<float>(absmax), count, blocksize, at<float>(code), at<uint8_t>(out),
                                      at<float>(nested), at<void>(stream), device));
      },
      nogil());

  // The fused linears. `seed` is the address of an int64 on the device, 0 without dropout.
  m.def(
      "xa",
      [](const Lora& lora, uint32_t threshold, Address seed, Address x, int dtype, int64_t m_, int64_t k,
         Address xa, Address stream, int device) {
        pk_lora with = lora;
        with.dropout_threshold = threshold;
        check(pk_xa_cuda(&with, at<int64_t>(seed), at<void>(x), dtype, m_, k, at<float>(xa), at<void>(stream),
                         device));
      },
      nogil());
  m.def(
      "gemv_4bit",
      [](const Weight& w, const Lora& lora, Address x, int dtype, int64_t m_, Address bias, int bias_dtype,
         Address xa, Address y, Address stream, int device) {
        check(pk_gemv_4bit_cuda(&w, &lora, at<void>(x), dtype, m_, at<void>(bias), bias_dtype, at<float>(xa),
                                at<void>(y), at<void>(stream), device));
      },
      nogil());
  m.def(
      "mma_4bit",
      [](const Weight& w, const Lora& lora, Address x, int dtype, int64_t m_, Address bias, int bias_dtype,
         Address xa, Address y, Address stream, int device) {
        check(pk_mma_4bit_cuda(&w, &lora, at<void>(x), dtype, m_, at<void>(bias), bias_dtype, at<float>(xa),
                               at<void>(y), at<void>(stream), device));
      },
      nogil());
  m.def("mma_4bit_supported", [](int dtype, int64_t n, int64_t k, int blocksize, int capability) {
    return pk_mma_4bit_supported(dtype, n, k, blocksize, capability) != 0;
  });
}
