// The registry, methods with their parameters, attention calls.
#include <fmt/format.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "bindings.h"
#include "core/error.h"
#include "inputs.h"
#include "tessera/method.h"

namespace tessera::python {

namespace {

nb::list names_of(const Phases& phases) {
  nb::list names;
  if (phases.prefill) names.append("prefill");
  if (phases.decode) names.append("decode");
  if (phases.backward) names.append("backward");
  return names;
}

nb::dict to_dict(const ParameterInfo& parameter) {
  nb::dict result;
  result["name"] = parameter.name;
  result["type"] = parameter.type;
  result["default"] = parameter.default_value;
  result["minimum"] = parameter.minimum;
  result["maximum"] = parameter.maximum;
  result["choices"] = nb::cast(parameter.choices);
  result["description"] = parameter.description;
  return result;
}

nb::dict to_dict(const SideInputInfo& side) {
  nb::dict result;
  result["name"] = side.name;
  result["shape"] = shape_text(side);
  result["minimum"] = side.minimum;
  result["maximum"] = side.maximum;
  result["required"] = side.required;
  result["description"] = side.description;
  return result;
}

nb::dict to_dict(const MethodInfo& info) {
  nb::dict result;
  result["name"] = info.name;
  result["family"] = info.family;
  result["summary"] = info.summary;
  result["paper"] = info.paper;
  result["phases"] = names_of(info.phases);
  result["causal"] = info.domain.causal;
  result["bidirectional"] = info.domain.bidirectional;
  result["variable_length"] = info.domain.variable_length;
  result["budget"] = info.budget
                         ? nb::cast(nb::make_tuple(info.budget->name, info.budget->sparsest, info.budget->densest))
                         : nb::none();
  nb::list side;
  for (const SideInputInfo& input : info.side) side.append(to_dict(input));
  result["side_inputs"] = side;
  result["has_plan"] = info.has_plan;
  result["own_cache"] = info.own_cache;
  return result;
}

nb::dict to_dict(const MethodEntry& entry) {
  nb::dict result = to_dict(entry.info);
  nb::list parameters;
  for (const ParameterInfo& parameter : entry.parameters) parameters.append(to_dict(parameter));
  result["parameters"] = parameters;
  return result;
}

std::span<float> lse_of(const std::optional<WritableArray>& lse) {
  return lse ? span_of<float>(*lse, "lse") : std::span<float>();
}

Plan make_plan(const MethodHandle& method, const Problem& problem, const Inputs& inputs, const CallOptions& options,
               State* state) {
  const nb::gil_scoped_release release;
  const auto turn = turn_of(state);
  return method.method->plan(problem, inputs.views(), options.context(state));
}

nb::tuple attend(const MethodHandle& method, const Problem& problem, const Inputs& inputs, const WritableArray& o,
                 const std::optional<WritableArray>& lse, const CallOptions& options, State* state, bool want_plan) {
  const AttentionOutputs outputs{.o = view_of(o, "out"), .lse = lse_of(lse)};
  std::optional<Plan> plan;
  if (want_plan && method.method->info().has_plan) plan.emplace();
  RunReport report;
  {
    const nb::gil_scoped_release release;
    const auto turn = turn_of(state);
    report = method.method->attend(problem, inputs.views(), outputs, options.context(state), plan ? &*plan : nullptr);
  }
  return nb::make_tuple(report_dict(report), plan ? nb::cast(std::move(*plan)) : nb::none());
}

nb::dict run_plan(const Plan& plan, const Inputs& inputs, const WritableArray& o,
                  const std::optional<WritableArray>& lse, const CallOptions& options) {
  const AttentionOutputs outputs{.o = view_of(o, "out"), .lse = lse_of(lse)};
  RunReport report;
  {
    const nb::gil_scoped_release release;
    report = run(plan, inputs.views(), outputs, options.run());
  }
  return report_dict(report);
}

void bind_calls(nb::module_& module) {
  nb::class_<CallOptions>(module, "CallOptions", "How a call runs and where in a model it happens.")
      .def(
          "__init__",
          [](CallOptions* self, const std::string& backend, const std::string& isa, int threads, std::int64_t layer,
             std::int64_t layers) {
            CallOptions options{backend, isa, threads, layer, layers};
            options.run();  // a wrong name is found here
            require(layers >= 1 && layer >= 0 && layer < layers, "layer is {} of {}; expected 0 to {}", layer, layers,
                    layers - 1);
            new (self) CallOptions(std::move(options));
          },
          nb::arg("backend") = "automatic", nb::arg("isa") = "", nb::arg("threads") = 0, nb::arg("layer") = 0,
          nb::arg("layers") = 1);

  nb::class_<Inputs>(module, "Inputs", "Queries, keys, values and what else a call reads; holds the arrays.")
      .def(
          "__init__",
          [](Inputs* self, Array q, Array k, Array v, std::optional<Array> query_scale, float softcap,
             std::optional<Array> alibi_slopes, std::optional<Array> sink_logits, std::optional<Array> key_bias,
             std::vector<std::tuple<Array, Array, std::optional<Array>>> sources, std::map<std::string, Array> side,
             std::optional<Array> page_table, std::int64_t page_size) {
            new (self)
                Inputs(std::move(q), std::move(k), std::move(v),
                       {std::move(query_scale), softcap, std::move(alibi_slopes), std::move(sink_logits),
                        std::move(key_bias), std::move(sources), std::move(side), std::move(page_table), page_size});
          },
          nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("query_scale") = nb::none(), nb::arg("softcap") = 0.F,
          nb::arg("alibi_slopes") = nb::none(), nb::arg("sink_logits") = nb::none(), nb::arg("key_bias") = nb::none(),
          nb::arg("sources") = std::vector<std::tuple<Array, Array, std::optional<Array>>>{},
          nb::arg("side") = std::map<std::string, Array>{}, nb::arg("page_table") = nb::none(),
          nb::arg("page_size") = 0)
      .def(
          "check", [](const Inputs& self, const Problem& problem) { check_inputs(problem, self.views()); },
          nb::arg("problem"), "Raises Error unless the arrays fit the problem.");

  module.def("run", &run_plan, nb::arg("plan"), nb::arg("inputs"), nb::arg("out"), nb::arg("lse").none(),
             nb::arg("options"), "Runs a plan into `out` and `lse`; returns a report.");
}

}  // namespace

void bind_methods(nb::module_& module) {
  bind_calls(module);
  nb::class_<State>(module, "State", "State of a method across calls; calls that share it take turns.")
      .def_prop_ro(
          "memory_bytes", [](const State& self) { return self.state->memory_bytes(); },
          "Bytes held beside keys and values.");

  nb::class_<MethodHandle>(module, "Method", "A method with its parameters.")
      .def(
          "__init__",
          [](MethodHandle* self, const std::string& spec) {
            new (self) MethodHandle{std::shared_ptr<const Method>(make_method(spec))};
          },
          nb::arg("spec"))
      .def_static(
          "with_parameters",
          [](const std::string& name, const std::string& json) {
            return MethodHandle{std::shared_ptr<const Method>(find_method(name).make(json))};
          },
          nb::arg("name"), nb::arg("parameters"))
      .def_prop_ro("info", [](const MethodHandle& self) { return to_dict(self.method->info()); })
      .def_prop_ro("parameters", [](const MethodHandle& self) { return self.method->parameters(); })
      .def_prop_ro("runs_its_plan", [](const MethodHandle& self) { return self.method->runs_its_plan(); })
      .def(
          "check_model",
          [](const MethodHandle& self, std::int64_t layers, std::int64_t q_heads, std::int64_t kv_heads) {
            self.method->check_model(layers, q_heads, kv_heads);
          },
          nb::arg("layers"), nb::arg("q_heads"), nb::arg("kv_heads"))
      .def("new_state",
           [](const MethodHandle& self) -> std::unique_ptr<State> {
             std::unique_ptr<MethodState> state = self.method->new_state();
             if (!state) return nullptr;
             auto result = std::make_unique<State>();
             result->state = std::move(state);
             return result;
           })
      .def("plan", &make_plan, nb::arg("problem"), nb::arg("inputs"), nb::arg("options"), nb::arg("state").none())
      .def("attend", &attend, nb::arg("problem"), nb::arg("inputs"), nb::arg("out"), nb::arg("lse").none(),
           nb::arg("options"), nb::arg("state").none(), nb::arg("want_plan"));

  module.def(
      "methods",
      [] {
        nb::list result;
        for (const MethodEntry& entry : methods()) result.append(to_dict(entry));
        return result;
      },
      "Every method of the registry as a dict.");
}

}  // namespace tessera::python
