// Searches that run before inference and write the configuration of a method: what they share.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"
#include "methods/parameters.h"
#include "tessera/method.h"
#include "tessera/model.h"

namespace tessera::tune {

/// What a search works on.
struct TuningTask {
  const Model* model = nullptr;
  std::string text;         ///< calibration text (UTF-8 or any bytes the vocabulary has); empty: generated
  std::int64_t length = 0;  ///< tokens of a calibration prompt; 0: the search's default
  RunOptions run;
  /// Work done of all of the named phase.
  std::function<void(std::string_view phase, double done, double total)> on_progress;
  /// Asked often; true ends the search with Cancelled.
  std::function<bool()> cancelled;

  /// Reports progress; throws Cancelled when asked to.
  void step(std::string_view phase, double done, double total) const;
};

/// What a search found.
struct TuningResult {
  Json parameters;  ///< of the method
  Json report;      ///< about the search, for people
};

/// One row of the list of searches.
struct TunerEntry {
  std::string method;  ///< whose parameters it writes
  std::string summary;
  std::string paper;
  std::vector<ParameterInfo> parameters;  ///< of the search
  /// From a JSON object of parameters of the search; throws Error for unknown keys and values out of range.
  std::function<TuningResult(const TuningTask& task, std::string_view parameters)> tune;
};

/// All searches, by name.
std::span<const TunerEntry> tuners();
/// Throws Error that suggests the nearest name.
const TunerEntry& find_tuner(std::string_view method);

/// Runs a search; the result is the content of a file that make_method() reads: {"method", "parameters", "tuned"}. It
/// has been read once, so that what is written can run. Throws Error for mistakes of the user, and Cancelled.
Json tune(std::string_view method, const TuningTask& task, std::string_view parameters = "{}");

/// The row of a search type, which has Params with visit(), info() giving a row without parameters and tune, and
/// static TuningResult tune(const TuningTask&, const Params&).
template <class Tuner>
TunerEntry tuner_entry() {
  TunerEntry entry = Tuner::info();
  typename Tuner::Params defaults;
  entry.parameters = parameters_of(defaults).describe();
  entry.tune = [name = "tune " + entry.method](const TuningTask& task, std::string_view parameters) {
    typename Tuner::Params params;
    parameters_of(params).assign(name, parameters);
    return Tuner::tune(task, params);
  };
  return entry;
}

// The searches, one file each.
TunerEntry duo_tuner();
TunerEntry moa_tuner();
TunerEntry razor_tuner();
TunerEntry minference_tuner();
TunerEntry sale_tuner();
TunerEntry sparge_tuner();
TunerEntry xattention_tuner();

}  // namespace tessera::tune
