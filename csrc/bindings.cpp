// The Python module asvit_fast._C: which instruction sets there are and which one runs, and what memory is kept. Ops
// register themselves with torch. It is in the limited API: one build serves every Python from 3.11 on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "memory_pool.h"
#include "products.h"
#include "window_attention_taylor.h"

namespace asvit_fast {
namespace {

PyObject* to_python(bool value) { return PyBool_FromLong(value); }
PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
PyObject* to_python(const std::string& value) { return PyUnicode_FromStringAndSize(value.data(), value.size()); }
PyObject* to_python(const std::vector<std::string>& values) {
  PyObject* const list = PyList_New(0);
  for (const std::string& value : values) {
    PyObject* const item = to_python(value);
    if (item) PyList_Append(list, item);
    Py_XDECREF(item);
  }
  return list;
}

// What Python calls for function(): exceptions become a ValueError.
template <auto function>
PyObject* call(PyObject*, PyObject*) {
  try {
    return to_python(function());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* call_set_isa(PyObject*, PyObject* name) {
  PyObject* const bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const std::string text = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  try {
    set_isa(text);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* call_set_memory_limit(PyObject*, PyObject* bytes) {
  const long long limit = PyLong_AsLongLong(bytes);
  if (PyErr_Occurred()) return nullptr;
  set_pool_limit(limit);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"compiled_isas", call<compiled_isas>, METH_NOARGS, "Instruction sets in this build, best first"},
    {"available_isas", call<available_isas>, METH_NOARGS, "Those of them that this CPU can run, best first"},
    {"get_isa", call<get_isa>, METH_NOARGS, "The one that kernels run with"},
    {"set_isa", call_set_isa, METH_O, "Choose another one (ValueError if it cannot run)"},
    {"prefers_own_products", call<prefers_own_products>, METH_NOARGS,
     "Whether Linear layers run through the kernel of this package with the present instruction set"},
    {"memory_limit", call<pool_limit>, METH_NOARGS, "Bytes of freed tensors that are kept for later ones at most"},
    {"set_memory_limit", call_set_memory_limit, METH_O, "Change that, and free the rest; 0: torch allocates all"},
    {"memory_kept", call<pool_size>, METH_NOARGS, "Bytes of freed tensors that are kept now"},
    {"free_kept_memory", call<free_pool>, METH_NOARGS, "Free them; returns how many they were"},
    {"memory_share", call<memory_share>, METH_NOARGS, "The limit that ASVIT_FAST_MEMORY_SHARE asks for"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "asvit_fast._C",
                          "Compiled kernels of asvit_fast; the ops are in torch.ops.asvit_fast_C",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace asvit_fast

PyMODINIT_FUNC PyInit__C() {
  using namespace asvit_fast;
  PyObject* const module = PyModule_Create(&definition);
  if (!module) return nullptr;
#ifdef ASVIT_FAST_CUDA
  PyModule_AddObject(module, "has_cuda", PyBool_FromLong(1));
#else
  PyModule_AddObject(module, "has_cuda", PyBool_FromLong(0));
#endif
  PyModule_AddIntConstant(module, "maximum_head_dim_cuda", kMaximumHeadDimCuda);  // of window_attention_taylor
  return module;
}
