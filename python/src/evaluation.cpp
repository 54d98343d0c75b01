// A model's answers to generated tasks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "core/error.h"
#include "eval/model_evaluation.h"
#include "session.h"
#include "tessera/model.h"

namespace tessera::python {

namespace {

struct Questions {
  std::vector<std::string> tasks;
  std::vector<std::int64_t> lengths;
  std::vector<std::string> methods;
  eval::EvaluationPhase phase = eval::EvaluationPhase::prefill;
  std::int64_t samples = 0;
  std::uint64_t seed = 0;
};

eval::EvaluationResult ask_one(const std::shared_ptr<const Model>& model, const Questions& questions,
                               const eval::EvaluationPoint& point) {
  SessionOptions options = eval::session_options_of(point.method, questions.phase);
  options.capacity = point.length + 1;
  options.count_decoding = questions.phase != eval::EvaluationPhase::prefill;
  options.cancelled = [] {
    const nb::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
  };
  Session session(*model, options);
  const eval::TaskInfo& task = eval::find_task(point.task);
  eval::SampleOptions sample;
  sample.length = point.length;
  sample.seed = questions.seed + static_cast<std::uint64_t>(point.sample);
  sample.count_tokens = [&](std::string_view text) { return static_cast<std::int64_t>(model->encode(text).size()); };
  eval::EvaluationResult result = eval::ask(session, task, eval::make_sample(task, sample));
  result.point = point;
  return result;
}

std::vector<eval::EvaluationSummary> ask_all(const std::shared_ptr<const Model>& model, const Questions& questions) {
  for (const std::string& spec : questions.methods) eval::session_options_of(spec, questions.phase);
  for (const std::string& task : questions.tasks) eval::find_task(task);
  std::vector<eval::EvaluationResult> results;
  for (const std::string& task : questions.tasks) {
    for (const std::int64_t length : questions.lengths) {
      for (std::int64_t sample = 0; sample < questions.samples; ++sample) {
        for (const std::string& method : questions.methods) {
          results.push_back(ask_one(model, questions, {task, length, method, sample}));
        }
      }
    }
  }
  return eval::summarise(results);
}

nb::tuple to_tuple(const eval::Estimate& estimate) {
  return nb::make_tuple(estimate.mean, estimate.low, estimate.high);
}

nb::dict to_dict(const eval::EvaluationSummary& summary) {
  nb::dict result;
  result["task"] = summary.task;
  result["length"] = summary.length;
  result["method"] = summary.method;
  result["samples"] = summary.samples;
  result["score"] = to_tuple(summary.score);
  result["difference"] = summary.difference ? nb::object(to_tuple(*summary.difference)) : nb::none();
  result["gold_bits"] = nb::cast(summary.gold_bits);
  result["density"] = summary.density;
  result["decode_density"] = summary.decode_density;
  result["prefill_ms"] = summary.prefill_ms;
  result["decode_ms"] = summary.decode_ms;
  result["cache_mb"] = summary.cache_mb;
  return result;
}

nb::list evaluate(const std::shared_ptr<const Model>& model, std::vector<std::string> tasks,
                  std::vector<std::int64_t> lengths, std::vector<std::string> methods, const std::string& phase,
                  std::int64_t samples, std::uint64_t seed) {
  require(samples > 0 && samples <= 100'000, "samples is {}; expected 1 to 100000", samples);
  const Questions questions{
      std::move(tasks), std::move(lengths), std::move(methods), eval::phase_from_name(phase), samples, seed};
  std::vector<eval::EvaluationSummary> summaries;
  try {
    const nb::gil_scoped_release release;
    summaries = ask_all(model, questions);
  } catch (const Cancelled&) {
    if (PyErr_Occurred() != nullptr) throw nb::python_error();
    throw;
  }
  nb::list result;
  for (const eval::EvaluationSummary& summary : summaries) result.append(to_dict(summary));
  return result;
}

}  // namespace

void bind_evaluation(nb::module_& module) {
  module.def(
      "tasks",
      [] {
        nb::list result;
        for (const eval::TaskInfo& task : eval::tasks()) result.append(nb::make_tuple(task.name, task.summary));
        return result;
      },
      "Generated tasks: (name, summary).");
  module.def("evaluate", &evaluate, nb::arg("model"), nb::arg("tasks"), nb::arg("lengths"), nb::arg("methods"),
             nb::arg("phase"), nb::arg("samples"), nb::arg("seed"),
             "Scores of methods on generated tasks, one dict per (task, length, method).");
}

}  // namespace tessera::python
