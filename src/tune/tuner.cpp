#include "tune/tuner.h"

#include <algorithm>

#include "core/error.h"

namespace tessera::tune {

void TuningTask::step(std::string_view phase, double done, double total) const {
  if (cancelled && cancelled()) throw Cancelled("interrupted");
  if (on_progress) on_progress(phase, done, total);
}

std::span<const TunerEntry> tuners() {
  static const std::vector<TunerEntry> entries{duo_tuner(),  minference_tuner(), moa_tuner(),       razor_tuner(),
                                               sale_tuner(), sparge_tuner(),     xattention_tuner()};
  return entries;
}

const TunerEntry& find_tuner(std::string_view method) {
  std::vector<std::string> known;
  for (const TunerEntry& entry : tuners()) {
    if (entry.method == method) return entry;
    known.push_back(entry.method);
  }
  fail("there is no search for method '{}'; did you mean '{}'? (known: {})", method, nearest_name(method, known),
       fmt::join(known, ", "));
}

Json tune(std::string_view method, const TuningTask& task, std::string_view parameters) {
  const TunerEntry& tuner = find_tuner(method);
  const ModelConfig& config = task.model->config();
  require(task.length >= 0 && task.length <= config.max_positions, "length is {}; expected 0 (the default) to {}",
          task.length, config.max_positions);
  TuningResult result = tuner.tune(task, parameters);
  result.report["search"] = parse_json(parameters, "parameters");
  result.report["model"] = {{"layers", config.layers},
                            {"q_heads", config.q_heads},
                            {"kv_heads", config.kv_heads},
                            {"head_dim", config.head_dim},
                            {"vocab_size", config.vocab_size}};
  const auto made = find_method(tuner.method).make(result.parameters.dump());
  made->check_model(config.layers, config.q_heads, config.kv_heads);
  return {{"method", tuner.method}, {"parameters", std::move(result.parameters)}, {"tuned", std::move(result.report)}};
}

}  // namespace tessera::tune
