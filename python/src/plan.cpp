// Plans: views of their arrays, set operations, statistics, files, pictures.
#include <fmt/format.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <bit>

#include "arrays.h"
#include "bindings.h"
#include "core/error.h"
#include "tessera/plan.h"
#include "view/picture.h"
#include "view/plan_map.h"

namespace tessera::python {

namespace {

using ReadOnlyBytes = nb::ndarray<nb::numpy, const std::uint8_t>;

const Plan& plan_of(nb::handle self) {
  return *nb::inst_ptr<Plan>(self);
}

/// A vector of the plan as an array that keeps the plan alive.
template <class T, std::vector<T> Plan::*member>
nb::ndarray<nb::numpy, const T> array_of(nb::handle self) {
  const std::vector<T>& values = plan_of(self).*member;
  return numpy_view(values.data(), {values.size()}, self);
}

static_assert(sizeof(PlanEntry) == 24 && std::endian::native == std::endian::little);

ReadOnlyBytes entries_of(nb::handle self) {
  const std::vector<PlanEntry>& entries = plan_of(self).entries;
  return numpy_view(reinterpret_cast<const std::uint8_t*>(entries.data()), {entries.size(), sizeof(PlanEntry)}, self);
}

nb::list orders_of(nb::handle self, const std::vector<std::vector<std::int32_t>>& orders) {
  nb::list result;
  for (const std::vector<std::int32_t>& order : orders) {
    result.append(nb::cast(numpy_view(order.data(), {order.size()}, self)));
  }
  return result;
}

nb::dict to_dict(const PlanStatistics& s) {
  nb::dict result;
  result["allowed_pairs"] = s.allowed_pairs;
  result["planned_pairs"] = s.planned_pairs;
  result["executed_pairs"] = s.executed_pairs;
  result["density"] = s.density;
  result["executed_density"] = s.executed_density;
  result["flops"] = s.flops;
  result["kv_bytes"] = s.kv_bytes;
  result["entries"] = s.entries;
  result["empty_rows"] = s.empty_rows;
  result["head_density"] = nb::cast(s.head_density);
  return result;
}

/// Runs a function of plans without the GIL.
template <class Function>
auto without_gil(const Function& function) {
  const nb::gil_scoped_release release;
  return function();
}

void bind_constructors(nb::class_<Plan>& plan) {
  plan.def_static(
          "dense",
          [](const Problem& problem, std::int64_t tile_q, std::int64_t tile_k) {
            return without_gil([&] { return dense_plan(problem, tile_q, tile_k); });
          },
          nb::arg("problem"), nb::arg("tile_q") = 128, nb::arg("tile_k") = 128)
      .def_static(
          "from_mask",
          [](const Problem& problem, const Array& mask, std::int64_t tile_q, std::int64_t tile_k) {
            const auto bytes = span_of<std::uint8_t>(mask, "mask");
            return without_gil([&] { return plan_from_mask(problem, bytes, tile_q, tile_k); });
          },
          nb::arg("problem"), nb::arg("mask"), nb::arg("tile_q") = 128, nb::arg("tile_k") = 128)
      .def_static(
          "from_block_mask",
          [](const Problem& problem, std::int64_t block_q, std::int64_t block_k, const Array& counts,
             const Array& indices, const Array& full_counts, const Array& full_indices) {
            return plan_from_block_mask(problem, block_q, block_k, span_of<std::int32_t>(counts, "kv_num_blocks"),
                                        span_of<std::int32_t>(indices, "kv_indices"),
                                        span_of<std::int32_t>(full_counts, "full_kv_num_blocks"),
                                        span_of<std::int32_t>(full_indices, "full_kv_indices"));
          },
          nb::arg("problem"), nb::arg("block_q"), nb::arg("block_k"), nb::arg("kv_num_blocks"), nb::arg("kv_indices"),
          nb::arg("full_kv_num_blocks"), nb::arg("full_kv_indices"))
      .def_static(
          "from_bsr",
          [](const Problem& problem, std::int64_t block_q, std::int64_t block_k, const Array& indptr,
             const Array& indices) {
            return plan_from_bsr(problem, block_q, block_k, span_of<std::int32_t>(indptr, "indptr"),
                                 span_of<std::int32_t>(indices, "indices"));
          },
          nb::arg("problem"), nb::arg("block_q"), nb::arg("block_k"), nb::arg("indptr"), nb::arg("indices"))
      .def_static(
          "load", [](const std::string& path) { return without_gil([&] { return load_plan(path); }); },
          nb::arg("path"));
}

void bind_arrays(nb::class_<Plan>& plan) {
  plan.def_prop_ro("row_begin", [](nb::handle self) { return array_of<std::int64_t, &Plan::row_begin>(self); })
      .def_prop_ro("entry_begin", [](nb::handle self) { return array_of<std::int64_t, &Plan::entry_begin>(self); })
      .def_prop_ro("entries", [](nb::handle self) { return entries_of(self); })
      .def_prop_ro("tokens", [](nb::handle self) { return array_of<std::int32_t, &Plan::tokens>(self); })
      .def_prop_ro("mask_words", [](nb::handle self) { return array_of<std::uint64_t, &Plan::mask_words>(self); })
      .def_prop_ro("bands",
                   [](nb::handle self) {
                     const std::vector<Window>& bands = plan_of(self).bands;
                     static_assert(sizeof(Window) == 16);
                     return numpy_view(reinterpret_cast<const std::int64_t*>(bands.data()), {bands.size(), 2}, self);
                   })
      .def_prop_ro("query_order", [](nb::handle self) { return orders_of(self, plan_of(self).query_order); })
      .def_prop_ro("key_order", [](nb::handle self) { return orders_of(self, plan_of(self).key_order); })
      .def_prop_ro("sources", [](const Plan& self) {
        nb::list result;
        for (const KeySourceInfo& source : self.sources) {
          result.append(nb::make_tuple(source.name, source.keys, source.repeats_allowed));
        }
        return result;
      });
}

void bind_operations(nb::class_<Plan>& plan) {
  const auto binary = [](Plan (*operation)(const Plan&, const Plan&)) {
    return [operation](const Plan& a, const Plan& b) { return without_gil([&] { return operation(a, b); }); };
  };
  plan.def("unite", binary(&unite), nb::arg("other"))
      .def("intersect", binary(&intersect), nb::arg("other"))
      .def("complement", [](const Plan& self) { return without_gil([&] { return complement(self); }); })
      .def("transpose",
           [](const Plan& self) {
             PlanTranspose result = without_gil([&] { return transpose(self); });
             const std::size_t blocks = result.key_tile_begin.size();
             const std::size_t offsets = result.offsets.size();
             const std::size_t rows = result.rows.size();
             return nb::make_tuple(numpy_array(std::move(result.key_tile_begin), {blocks}),
                                   numpy_array(std::move(result.offsets), {offsets}),
                                   numpy_array(std::move(result.rows), {rows}));
           })
      .def("validate", [](const Plan& self) { without_gil([&] { validate(self); }); })
      .def("statistics", [](const Plan& self) { return to_dict(without_gil([&] { return statistics(self); })); })
      .def("explain", [](const Plan& self) { return without_gil([&] { return explain(self); }); })
      .def(
          "coverage",
          [](const Plan& self, const Plan& reference) {
            return without_gil([&] { return coverage(self, reference); });
          },
          nb::arg("reference"))
      .def(
          "save", [](const Plan& self, const std::string& path) { without_gil([&] { save(self, path); }); },
          nb::arg("path"))
      .def("to_mask",
           [](const Plan& self) {
             const Problem& p = self.problem;
             std::vector<std::uint8_t> mask = without_gil([&] { return dense_mask(self); });
             const std::size_t batch = p.variable_length() ? 1 : static_cast<std::size_t>(p.batch);
             return numpy_array(std::move(mask),
                                {batch, static_cast<std::size_t>(p.q_heads), static_cast<std::size_t>(p.q_len),
                                 static_cast<std::size_t>(p.kv_len)});
           })
      .def(
          "__eq__", [](const Plan& a, const Plan& b) { return a == b; }, nb::is_operator(),
          nb::sig("def __eq__(self, arg: object, /) -> bool"));
}

PlanMap map_of(const Plan& plan, std::int64_t sequence, std::int64_t head, std::int64_t cells) {
  require(sequence >= 0 && sequence < plan.problem.batch, "sequence is {}; expected 0 to {}", sequence,
          plan.problem.batch - 1);
  require(cells >= 1 && cells <= 4096, "cells is {}; expected 1 to 4096", cells);
  const std::int64_t keys = plan.problem.kv_len_of(sequence);
  const std::int64_t queries = plan.problem.q_offset_of(sequence) + plan.problem.q_len_of(sequence);
  PlanMap map(queries, keys, cells);
  map.add(plan, sequence, head);
  return map;
}

void bind_pictures(nb::class_<Plan>& plan) {
  plan.def(
          "map",
          [](const Plan& self, std::int64_t sequence, std::int64_t head, std::int64_t cells) {
            std::vector<float> shares;
            std::int64_t rows = 0;
            std::int64_t columns = 0;
            {
              const nb::gil_scoped_release release;
              const PlanMap map = map_of(self, sequence, head, cells);
              rows = map.rows();
              columns = map.columns();
              shares.reserve(static_cast<std::size_t>(rows * columns));
              for (std::int64_t row = 0; row < rows; ++row) {
                for (std::int64_t column = 0; column < columns; ++column) {
                  shares.push_back(static_cast<float>(map.share(row, column)));
                }
              }
            }
            return numpy_array(std::move(shares), {static_cast<std::size_t>(rows), static_cast<std::size_t>(columns)});
          },
          nb::arg("sequence"), nb::arg("head"), nb::arg("cells"))
      .def(
          "picture",
          [](const Plan& self, std::int64_t sequence, std::int64_t head, std::int64_t cells) {
            return without_gil([&] { return data_uri("image/png", png_of(map_of(self, sequence, head, cells))); });
          },
          nb::arg("sequence"), nb::arg("head"), nb::arg("cells"));
}

}  // namespace

void bind_plan(nb::module_& module) {
  nb::class_<Plan> plan(module, "Plan", "What tessera.Plan wraps.");
  plan.def_ro("problem", &Plan::problem)
      .def_ro("tile_q", &Plan::tile_q)
      .def_ro("tile_k", &Plan::tile_k)
      .def_ro("plan_sequences", &Plan::plan_sequences)
      .def_ro("plan_heads", &Plan::plan_heads)
      .def_prop_ro("rows", &Plan::rows)
      .def_prop_ro("memory_bytes", &Plan::memory_bytes);
  bind_constructors(plan);
  bind_arrays(plan);
  bind_operations(plan);
  bind_pictures(plan);
}

}  // namespace tessera::python
