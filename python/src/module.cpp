// The extension module tessera._core. Functions release the GIL while the library works.
#include <nanobind/nanobind.h>

#include "bindings.h"

namespace {

// nanobind's macro makes the entry point.
NB_MODULE(_core, module) {  // NOLINT
  module.doc() = "The library as the Python package sees it; use the package tessera instead.";
  nanobind::set_leak_warnings(false);  // caches and registries of other packages hold methods until the end
  tessera::python::bind_core(module);
  tessera::python::bind_plan(module);
  tessera::python::bind_methods(module);
  tessera::python::bind_gradients(module);
  tessera::python::bind_model(module);
  tessera::python::bind_evaluation(module);
}

}  // namespace
