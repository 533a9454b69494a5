// Calls of kernels for later: described once, run together as often as wanted, so that Python is entered once
// for all of them. Only bindings.cpp includes it.
#pragma once
#include <functional>

// An address that each run names: `slot` of its bases, and bytes behind that. A base of 0 is null.
constexpr Address LATER = Address(1) << 62;
constexpr int SLOT_BITS = 48;
using Bases = std::vector<Address>;

static Address resolved(Address a, const Bases& bases) {
  if (!(a & LATER)) return a;
  const Address base = bases.at((a >> SLOT_BITS) & 0xff);
  return base ? base + (a & ((Address(1) << SLOT_BITS) - 1)) : 0;
}

template <typename T>
static T moved(T value, const Bases& bases) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(resolved(reinterpret_cast<Address>(value), bases));
  else return value;
}
template <typename... T>
static void move_all(const Bases& bases, T*&... pointers) {
  ((pointers = moved(pointers, bases)), ...);
}
static pk_heads moved(pk_heads h, const Bases& bases) { return move_all(bases, h.data), h; }
static pk_rms_norm moved(pk_rms_norm n, const Bases& bases) { return move_all(bases, n.x, n.weight), n; }
static pk_rope_heads moved(pk_rope_heads h, const Bases& bases) { return move_all(bases, h.x, h.y), h; }
static pk_attention moved(pk_attention a, const Bases& bases) {
  move_all(bases, a.q.data, a.k.data, a.v.data, a.mask);
  return a;
}
static pk_attention_grad moved(pk_attention_grad g, const Bases& bases) {
  move_all(bases, g.y.data, g.dy.data, g.dq.data, g.dk.data, g.dv.data);
  return g;
}
static pk_member moved(pk_member m, const Bases& bases) {
  move_all(bases, m.bias, m.y, m.dy, m.d_bias);
  return m;
}
static pk_adapter moved(pk_adapter a, const Bases& bases) {
  move_all(bases, a.xa, a.dyb, a.d_lora_a, a.d_lora_b);
  return a;
}
template <typename T, typename Object>
static std::vector<T> moved_list(const std::vector<Object>& list, const Bases& bases) {
  std::vector<T> found;
  for (const Object& each : list) found.push_back(moved(static_cast<const T&>(each), bases));
  return found;
}

struct Calls {
  std::vector<std::function<void(const Bases&)>> list;
  void run(const Bases& bases) const {
    for (const auto& call : list) call(bases);
  }
};

// An argument as it is kept: a described one by value.
template <typename T>
using Kept = std::conditional_t<std::is_pointer_v<T> && !std::is_same_v<typename Passed<T>::Type, Address>,
                                std::remove_cv_t<std::remove_pointer_t<T>>, T>;
template <typename T>
static Kept<T> kept(typename Passed<T>::Type value) {
  if constexpr (std::is_same_v<Kept<T>, T>) return Passed<T>::given(value);
  else return *Passed<T>::given(value);
}
template <typename T>
static T argument(Kept<T>& value) {
  if constexpr (std::is_same_v<Kept<T>, T>) return value;
  else return &value;
}

// A kernel as a method of Calls: its arguments but the last one, the number of threads.
template <auto function, typename... Types, size_t... i>
static void later(py::class_<Calls>& c, const char* name, int (*)(Types...), std::index_sequence<i...>) {
  using All = std::tuple<Types...>;
  c.def(name, [](Calls& calls, typename Passed<std::tuple_element_t<i, All>>::Type... values) {
    calls.list.push_back(
        [stored = std::make_tuple(kept<std::tuple_element_t<i, All>>(values)...)](const Bases& bases) {
          auto now = std::make_tuple(moved(std::get<i>(stored), bases)...);
          check(function(argument<std::tuple_element_t<i, All>>(std::get<i>(now))..., threads()));
        });
  });
}
template <auto function, typename... Types>
static void later(py::class_<Calls>& c, const char* name, int (*of)(Types...)) {
  later<function>(c, name, of, std::make_index_sequence<sizeof...(Types) - 1>());
}

static void bind_calls(py::module_& m) {
  py::class_<Calls> c(m, "Calls");
  c.def(py::init<>()).def("run", &Calls::run, py::call_guard<py::gil_scoped_release>());
#define PK_LATER(name) later<pk_##name##_cpu>(c, #name, pk_##name##_cpu);
  PK_EACH_FUNCTION(PK_LATER)
#undef PK_LATER
  c.def("qlora_group_fwd", [](Calls& calls, std::vector<Member> members, std::vector<Adapter> adapters,
                              Address x, int dtype, int64_t m_) {
    calls.list.push_back([=](const Bases& bases) {
      const auto list = moved_list<pk_member>(members, bases);
      const auto low = moved_list<pk_adapter>(adapters, bases);
      const Scratch in = scratch_of(list, low, m_);
      check(pk_qlora_group_fwd_cpu(list.data(), list.size(), low.data(), low.size(),
                                   at<void>(resolved(x, bases)), dtype, m_, in.data, in.bytes, threads()));
    });
  });
  c.def("qlora_group_bwd", [](Calls& calls, std::vector<Member> members, std::vector<Adapter> adapters,
                              Address x, int dtype, int64_t m_, Address dx) {
    calls.list.push_back([=](const Bases& bases) {
      const auto list = moved_list<pk_member>(members, bases);
      const auto low = moved_list<pk_adapter>(adapters, bases);
      const Scratch in = scratch_of(list, low, m_);
      check(pk_qlora_group_bwd_cpu(list.data(), list.size(), low.data(), low.size(),
                                   at<void>(resolved(x, bases)), dtype, m_, at<void>(resolved(dx, bases)),
                                   in.data, in.bytes, threads()));
    });
  });
  c.def("glu_fwd", [](Calls& calls, Address gate, Address up, int dtype, int64_t m_, int64_t n,
                      int activation, Address h) {
    calls.list.push_back([=](const Bases& bases) {
      const pk_glu of{at<void>(resolved(gate, bases)), at<void>(resolved(up, bases)), n, n};
      check(pk_glu_fwd_cpu(&of, dtype, m_, n, activation, at<void>(resolved(h, bases)), threads()));
    });
  });
  c.def("glu_bwd", [](Calls& calls, Address gate, Address up, int dtype, int64_t m_, int64_t n,
                      int activation, Address dy, Address d_gate, Address d_up) {
    calls.list.push_back([=](const Bases& bases) {
      const pk_glu of{at<void>(resolved(gate, bases)), at<void>(resolved(up, bases)), n, n};
      const pk_glu_grad grads{at<void>(resolved(d_gate, bases)), at<void>(resolved(d_up, bases)), n, n};
      check(pk_glu_bwd_cpu(&of, &grads, dtype, m_, n, activation, at<void>(resolved(dy, bases)), nullptr,
                           threads()));
    });
  });
}
