// Errors, instruction sets, the problem.
#include <fmt/format.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "bindings.h"
#include "core/error.h"
#include "tessera/attention.h"
#include "tessera/core.h"

namespace tessera::python {

namespace {

void bind_problem(nb::module_& module) {
  nb::class_<TokenGrid>(module, "TokenGrid",
                        "Tokens on a grid of (frames, rows, columns), columns fastest, between text tokens.")
      .def(
          "__init__",
          [](TokenGrid* self, std::array<std::int64_t, 3> extent, std::int64_t prefix, std::int64_t suffix) {
            new (self) TokenGrid{extent, prefix, suffix};
          },
          nb::arg("extent"), nb::arg("prefix") = 0, nb::arg("suffix") = 0)
      .def_ro("extent", &TokenGrid::extent, "Frames, rows, columns.")
      .def_ro("prefix", &TokenGrid::prefix, "Text tokens before the grid.")
      .def_ro("suffix", &TokenGrid::suffix, "Text tokens after it.")
      .def_prop_ro("tokens", &TokenGrid::tokens, "All tokens: keys of a sequence.")
      .def(
          "__eq__", [](const TokenGrid& a, const TokenGrid& b) { return a == b; }, nb::is_operator(),
          nb::sig("def __eq__(self, arg: object, /) -> bool"))
      .def("__repr__", [](const TokenGrid& grid) {
        return fmt::format("TokenGrid(({}, {}, {}), prefix={}, suffix={})", grid.extent[0], grid.extent[1],
                           grid.extent[2], grid.prefix, grid.suffix);
      });

  nb::class_<Problem>(module, "Problem",
                      "Shapes and semantics of one attention call. Queries are the last tokens unless q_offset says "
                      "otherwise (bottom-right alignment).")
      .def(
          "__init__",
          [](Problem* self, std::int64_t batch, std::int64_t q_heads, std::int64_t kv_heads, std::int64_t q_len,
             std::int64_t kv_len, std::int64_t head_dim, std::int64_t value_dim, bool causal,
             std::optional<float> scale, std::optional<std::int64_t> q_offset, std::vector<std::int64_t> cu_seqlens_q,
             std::vector<std::int64_t> cu_seqlens_k, std::optional<TokenGrid> grid) {
            Problem problem{.batch = batch,
                            .q_heads = q_heads,
                            .kv_heads = kv_heads,
                            .q_len = q_len,
                            .kv_len = kv_len,
                            .head_dim = head_dim,
                            .value_dim = value_dim > 0 ? value_dim : head_dim,
                            .scale = scale,
                            .causal = causal,
                            .q_offset = q_offset,
                            .cu_seqlens_q = std::move(cu_seqlens_q),
                            .cu_seqlens_k = std::move(cu_seqlens_k),
                            .grid = grid};
            problem.validate();
            new (self) Problem(std::move(problem));
          },
          nb::kw_only(), nb::arg("batch") = 1, nb::arg("q_heads") = 1, nb::arg("kv_heads") = 1, nb::arg("q_len"),
          nb::arg("kv_len"), nb::arg("head_dim"), nb::arg("value_dim") = 0, nb::arg("causal") = false,
          nb::arg("scale") = nb::none(), nb::arg("q_offset") = nb::none(),
          nb::arg("cu_seqlens_q") = std::vector<std::int64_t>{}, nb::arg("cu_seqlens_k") = std::vector<std::int64_t>{},
          nb::arg("grid") = nb::none(),
          "Raises Error for sizes that are not positive or not consistent. value_dim 0: head_dim.")
      .def_ro("batch", &Problem::batch, "Sequences.")
      .def_ro("q_heads", &Problem::q_heads)
      .def_ro("kv_heads", &Problem::kv_heads, "Divides q_heads.")
      .def_ro("q_len", &Problem::q_len, "Queries per sequence, or all of a variable-length batch.")
      .def_ro("kv_len", &Problem::kv_len)
      .def_ro("head_dim", &Problem::head_dim)
      .def_ro("value_dim", &Problem::value_dim)
      .def_ro("causal", &Problem::causal)
      .def_prop_ro("scale", &Problem::softmax_scale, "Factor of the scores.")
      .def_ro("q_offset", &Problem::q_offset, "Position of the first query among the keys; None: bottom-right.")
      .def_ro("cu_seqlens_q", &Problem::cu_seqlens_q)
      .def_ro("cu_seqlens_k", &Problem::cu_seqlens_k)
      .def_ro("grid", &Problem::grid)
      .def_prop_ro("allowed_pairs", &Problem::allowed_pairs, "(query, key) pairs of one head that the mask allows.")
      .def("__repr__", [](const Problem& p) {
        return fmt::format(
            "Problem(batch={}, q_heads={}, kv_heads={}, q_len={}, kv_len={}, head_dim={}, value_dim={}, "
            "causal={})",
            p.batch, p.q_heads, p.kv_heads, p.q_len, p.kv_len, p.head_dim, p.value_dim, p.causal ? "True" : "False");
      });
}

}  // namespace

void bind_core(nb::module_& module) {
  const nb::exception<Error> error(module, "Error", PyExc_ValueError);
  error.attr("__doc__") = "Bad input: the message names the argument, its value and what was expected.";
  bind_problem(module);
  module.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : supported_isas()) names.emplace_back(name_of(isa));
        return names;
      },
      "Instruction sets that this machine can run, ascending.");
  module.def(
      "default_isa", [] { return std::string(name_of(default_isa())); },
      "The best of them, or the one that TESSERA_ISA names.");
}

}  // namespace tessera::python
