// pybind11 over the C ABI: argument passing only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings.h"

#define PK_LISTS_ALONE
#include "cpu/ops.h"

namespace py = pybind11;

// The framework's number of threads. A build by Clang brings an OpenMP runtime of its own, which does not
// hear of torch.set_num_threads: the one that torch has loaded for all is asked.
static int threads() {
#if defined(__linux__)
  static const auto of_process = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
  if (of_process) return of_process();
#endif
  return 0;
}

static void check(int status) {
  if (status != PK_OK)
    throw std::invalid_argument(std::string("peftkern native call: ") + pk_status_string(status));
}

// What a linear's kernel works in: this thread's, which its later calls use again; it grows, within the few
// megabytes of the plan.
struct Scratch {
  void* data;
  int64_t bytes;
};
static Scratch scratch(int64_t bytes) {
  static thread_local std::unique_ptr<char[]> held;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    held.reset();
    size = 0;
    held.reset(new char[bytes]);
    size = bytes;
  }
  return {held.get(), size};
}

struct Lora : pk_lora {
  Lora(Address a, Address b, int64_t r, int dtype, float scaling, uint32_t threshold, Address seed)
      : pk_lora{at<void>(a), at<void>(b), r, dtype, scaling, threshold, seed ? *at<uint64_t>(seed) : 0} {}
};

struct Member : pk_member {
  Member(const Weight& weight, Address bias, int bias_dtype, Address y, Address dy, Address d_bias,
         Address scale, Address u, Address norm, Address squares, Address magnitude, Address d_scale)
      : pk_member{weight,          at<void>(bias),     bias_dtype,           at<void>(y),
                  at<void>(dy),    at<float>(d_bias),  at<float>(scale),     at<void>(u),
                  at<float>(norm), at<float>(squares), at<float>(magnitude), at<float>(d_scale)} {}
};

struct Adapter : pk_adapter {
  Adapter(const Lora& lora, int64_t member, int64_t row_begin, int64_t row_end, Address xa, Address dyb,
          Address d_lora_a, Address d_lora_b)
      : pk_adapter{lora,          member,         row_begin,          row_end,
                   at<float>(xa), at<float>(dyb), at<void>(d_lora_a), at<void>(d_lora_b)} {}
};

// How Python passes an argument of the C ABI: descriptors as objects, other pointers as addresses.
template <typename T>
struct Passed {
  using Type = std::conditional_t<std::is_pointer_v<T>, Address, T>;
  static T given(Type value) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(value);
    else return value;
  }
};
template <typename Struct, typename Object>
struct Described {
  using Type = const Object&;
  static const Struct* given(const Object& value) { return &value; }
};
template <>
struct Passed<const pk_weight*> : Described<pk_weight, Weight> {};
template <>
struct Passed<const pk_lora*> : Described<pk_lora, Lora> {};
template <>
struct Passed<const pk_rms_norm*> : Described<pk_rms_norm, pk_rms_norm> {};
template <>
struct Passed<const pk_rope_heads*> : Described<pk_rope_heads, pk_rope_heads> {};
template <>
struct Passed<const pk_heads*> : Described<pk_heads, pk_heads> {};
template <>
struct Passed<const pk_attention*> : Described<pk_attention, pk_attention> {};
template <>
struct Passed<const pk_attention_grad*> : Described<pk_attention_grad, pk_attention_grad> {};

// A kernel under a name in Python: its arguments but the last one, the number of threads.
template <auto function, typename... Types, size_t... i>
static void define(py::module_& m, const char* name, int (*)(Types...), std::index_sequence<i...>) {
  using All = std::tuple<Types...>;
  m.def(
      name,
      [](typename Passed<std::tuple_element_t<i, All>>::Type... values) {
        check(function(Passed<std::tuple_element_t<i, All>>::given(values)..., threads()));
      },
      py::call_guard<py::gil_scoped_release>());
}
template <auto function, typename... Types>
static void define(py::module_& m, const char* name, int (*of)(Types...)) {
  define<function>(m, name, of, std::make_index_sequence<sizeof...(Types) - 1>());
}

// What a group's kernel works in.
static Scratch scratch_of(const std::vector<pk_member>& list, const std::vector<pk_adapter>& low, int64_t m) {
  return scratch(
      pk_qlora_group_scratch_bytes(list.data(), list.size(), low.data(), low.size(), m, threads()));
}

#include "bindings_calls.h"
#include "bindings_watch.h"

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
  m.def("set_cores", [](int how) { check(pk_set_cores(how)); });
  m.def("core_distance", [] { return pk_core_distance(threads()); }, nogil());

  py::class_<Weight>(m, "Weight")
      .def(py::init<Address, Address, Address, Address, Address, Address, Address, int64_t, int64_t, int, int,
                    int>());
  py::class_<Lora>(m, "Lora").def(py::init<Address, Address, int64_t, int, float, uint32_t, Address>());

  m.def(
      "lora_bwd",
      [](const Lora& lora, Address dy, Address x, int dtype, int64_t m_, int64_t n, int64_t k, Address xa,
         Address dyb, Address dx, Address d_a, Address d_b, Address d_bias) {
        const pk_lora_grad grad{at<void>(dy),  at<float>(xa), at<float>(dyb),   at<void>(dx),
                                at<void>(d_a), at<void>(d_b), at<float>(d_bias)};
        const Scratch in = scratch(pk_lora_scratch_bytes(m_, n, k, lora.r, threads()));
        check(pk_lora_bwd_cpu(&lora, &grad, at<void>(x), dtype, m_, n, k, in.data, in.bytes, threads()));
      },
      nogil());
  m.def(
      "lora_fwd",
      [](const Lora& lora, Address x, int dtype, int64_t m_, int64_t n, int64_t k, Address bias,
         int bias_dtype, Address y, Address xa) {
        const Scratch in = scratch(pk_lora_scratch_bytes(m_, n, k, lora.r, threads()));
        check(pk_lora_fwd_cpu(&lora, at<void>(x), dtype, m_, n, k, at<void>(bias), bias_dtype, at<void>(y),
                              at<float>(xa), in.data, in.bytes, threads()));
      },
      nogil());
  m.def(
      "qlora_linear_fwd",
      [](const Weight& w, const Lora& lora, Address x, int dtype, int64_t m_, Address bias, int bias_dtype,
         Address y, Address xa, bool gemv) {
        const Scratch in = scratch(pk_qlora_linear_scratch_bytes(m_, w.n, w.k, lora.r, threads()));
        check(pk_qlora_linear_fwd_cpu(&w, &lora, at<void>(x), dtype, m_, at<void>(bias), bias_dtype,
                                      at<void>(y), at<float>(xa), gemv, in.data, in.bytes, threads()));
      },
      nogil());
  m.def(
      "qlora_linear_bwd",
      [](const Weight& w, const Lora& lora, Address dy, Address x, int dtype, int64_t m_, Address xa,
         Address dyb, Address dx, Address d_a, Address d_b, Address d_bias) {
        const Scratch in = scratch(pk_qlora_linear_scratch_bytes(m_, w.n, w.k, lora.r, threads()));
        check(pk_qlora_linear_bwd_cpu(&w, &lora, at<void>(dy), at<void>(x), dtype, m_, at<float>(xa),
                                      at<float>(dyb), at<void>(dx), at<void>(d_a), at<void>(d_b),
                                      at<float>(d_bias), in.data, in.bytes, threads()));
      },
      nogil());

  m.def("scratch_bytes", [](int64_t m_, int64_t n, int64_t k, int64_t r) {
    return pk_qlora_linear_scratch_bytes(m_, n, k, r, threads());
  });
  py::class_<Member>(m, "Member")
      .def(py::init<const Weight&, Address, int, Address, Address, Address, Address, Address, Address,
                    Address, Address, Address>(),
           py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("scale") = 0,
           py::arg("u") = 0, py::arg("norm") = 0, py::arg("squares") = 0, py::arg("magnitude") = 0,
           py::arg("d_scale") = 0);
  py::class_<Adapter>(m, "Adapter")
      .def(py::init<const Lora&, int64_t, int64_t, int64_t, Address, Address, Address, Address>());
  using Members = std::vector<pk_member>;
  using Adapters = std::vector<pk_adapter>;
  const auto members_of = [](const std::vector<Member>& list) { return Members(list.begin(), list.end()); };
  const auto adapters_of = [](const std::vector<Adapter>& list) {
    return Adapters(list.begin(), list.end());
  };
  m.def(
      "qlora_group_fwd",
      [=](const std::vector<Member>& members, const std::vector<Adapter>& adapters, Address x, int dtype,
          int64_t m_) {
        const Members list = members_of(members);
        const Adapters low = adapters_of(adapters);
        const Scratch in = scratch_of(list, low, m_);
        check(pk_qlora_group_fwd_cpu(list.data(), list.size(), low.data(), low.size(), at<void>(x), dtype, m_,
                                     in.data, in.bytes, threads()));
      },
      nogil());
  m.def(
      "qlora_group_bwd",
      [=](const std::vector<Member>& members, const std::vector<Adapter>& adapters, Address x, int dtype,
          int64_t m_, Address dx) {
        const Members list = members_of(members);
        const Adapters low = adapters_of(adapters);
        const Scratch in = scratch_of(list, low, m_);
        check(pk_qlora_group_bwd_cpu(list.data(), list.size(), low.data(), low.size(), at<void>(x), dtype, m_,
                                     at<void>(dx), in.data, in.bytes, threads()));
      },
      nogil());
  m.def(
      "dropout_mask",
      [](int64_t m_, int64_t k, uint32_t threshold, Address seed, Address mask) {
        check(pk_dropout_mask_cpu(m_, k, threshold, seed ? *at<uint64_t>(seed) : 0, at<float>(mask),
                                  threads()));
      },
      nogil());
  m.def(
      "glu_fwd",
      [](Address gate, int64_t ld_gate, Address up, int64_t ld_up, int dtype, int64_t m_, int64_t n,
         int activation, Address h) {
        const pk_glu operands{at<void>(gate), at<void>(up), ld_gate, ld_up};
        check(pk_glu_fwd_cpu(&operands, dtype, m_, n, activation, at<void>(h), threads()));
      },
      nogil());
  m.def(
      "glu_bwd",
      [](Address gate, int64_t ld_gate, Address up, int64_t ld_up, int dtype, int64_t m_, int64_t n,
         int activation, Address dy, Address d_gate, int64_t ld_d_gate, Address d_up, int64_t ld_d_up,
         Address h) {
        const pk_glu operands{at<void>(gate), at<void>(up), ld_gate, ld_up};
        const pk_glu_grad grads{at<void>(d_gate), at<void>(d_up), ld_d_gate, ld_d_up};
        check(pk_glu_bwd_cpu(&operands, &grads, dtype, m_, n, activation, at<void>(dy), at<void>(h),
                             threads()));
      },
      nogil());
  py::class_<pk_rms_norm>(m, "RmsNorm")
      .def(py::init([](Address x, Address weight, int64_t m_, int64_t n, int64_t ld_x, int dtype,
                       int weight_dtype, int y_dtype, int cast, float eps, float offset) {
        return pk_rms_norm{at<void>(x),  at<void>(weight), m_,   n,   ld_x,  dtype,
                           weight_dtype, y_dtype,          cast, eps, offset};
      }));
  m.def("rms_norm_scratch_bytes", [](int64_t m_, int64_t n, bool with_d_weight) {
    return pk_rms_norm_scratch_bytes(m_, n, with_d_weight);
  });
  py::class_<pk_rope_heads>(m, "RopeHeads")
      .def(py::init([](Address x, Address y, int64_t heads, int64_t x_batch, int64_t x_head, int64_t x_seq,
                       int64_t y_batch, int64_t y_head, int64_t y_seq) {
        return pk_rope_heads{at<void>(x), at<void>(y), heads, x_batch, x_head, x_seq, y_batch, y_head, y_seq};
      }));
  py::class_<pk_heads>(m, "Heads").def(py::init([](Address data, int64_t batch, int64_t head, int64_t row) {
    return pk_heads{at<void>(data), batch, head, row};
  }));
  py::class_<pk_attention>(m, "Attention")
      .def(py::init([](const pk_heads& q, const pk_heads& k, const pk_heads& v, int64_t batch, int64_t heads,
                       int64_t kv_heads, int64_t seq, int64_t keys, int64_t dim, float scale, bool causal,
                       Address mask, int64_t mask_batch, int64_t mask_row) {
        return pk_attention{q,          k,       v,   batch, heads,  kv_heads,
                            seq,        keys,    dim, scale, causal, at<uint8_t>(mask),
                            mask_batch, mask_row};
      }));
  py::class_<pk_attention_grad>(m, "AttentionGrad")
      .def(py::init([](const pk_heads& y, const pk_heads& dy, const pk_heads& dq, const pk_heads& dk,
                       const pk_heads& dv) { return pk_attention_grad{y, dy, dq, dk, dv}; }));
#define PK_DEFINED(name) define<pk_##name##_cpu>(m, #name, pk_##name##_cpu);
  PK_EACH_FUNCTION(PK_DEFINED)
#undef PK_DEFINED
  m.def("attention_served", [] { return pk_attention_served() != 0; });
  m.def("linear_cross_entropy_scratch_bytes", [](int64_t m_, int64_t n, int64_t k, bool gradient) {
    return pk_linear_cross_entropy_scratch_bytes(m_, n, k, gradient, threads());
  });
  m.def("attention_scratch_bytes", [](const pk_attention& a, bool backward) {
    return pk_attention_scratch_bytes(&a, backward, threads());
  });
  bind_calls(m);
  m.def("entries_hold", entries_hold);
  m.def("advise_huge_pages",
        [](Address data, int64_t bytes) { check(pk_advise_huge_pages(at<void>(data), bytes)); });
}
