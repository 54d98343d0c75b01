// The parts of the extension module tessera._core, one file each.
#pragma once

#include <nanobind/nanobind.h>

namespace tessera::python {

namespace nb = nanobind;  // NOLINT(misc-unused-alias-decls)

void bind_core(nb::module_& module);
void bind_plan(nb::module_& module);
void bind_methods(nb::module_& module);
void bind_gradients(nb::module_& module);
void bind_model(nb::module_& module);
void bind_evaluation(nb::module_& module);

}  // namespace tessera::python
