// Whether dicts hold what they held: a loop over some hundred entries that are in no cache, whose lookups a
// processor overlaps where Python does them one by one. Only bindings.cpp includes it.
#pragma once

// flat: a dict, a key and a value, again and again; the value `absent` stands for no entry. empty: dicts
// that have none.
static bool entries_hold(const py::list& flat, py::handle absent, const py::list& empty) {
  PyObject* const* dicts = PySequence_Fast_ITEMS(empty.ptr());
  const Py_ssize_t all = PyList_GET_SIZE(empty.ptr());
  for (Py_ssize_t i = 0; i < all; i++) {
    if (i + 16 < all) __builtin_prefetch(dicts[i + 16]);
    const Py_ssize_t size = PyObject_Size(dicts[i]);
    if (size < 0) throw py::error_already_set();
    if (size) return false;
  }
  PyObject* const* items = PySequence_Fast_ITEMS(flat.ptr());
  const Py_ssize_t count = PyList_GET_SIZE(flat.ptr());
  for (Py_ssize_t i = 0; i + 3 <= count; i += 3) {
    if (i + 48 < count) __builtin_prefetch(items[i + 48]);
    PyObject* found = PyDict_GetItemWithError(items[i], items[i + 1]);
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    if ((found ? found : absent.ptr()) != items[i + 2]) return false;
  }
  return true;
}
