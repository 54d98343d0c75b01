// Numbers per layer and query head that a search wrote: thresholds and the like, which replace a parameter of all
// heads.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "methods/parameters.h"
#include "tessera/method.h"

namespace tessera {

/// A table [layer][query head] of numbers, or of objects with several of them.
class HeadValues {
 public:
  /// One number of a head. Without a name the head is that number itself.
  struct Field {
    std::string name;
    double least;
    double most;
  };

  /// Without a configuration, heads have the values that of_layer() is given.
  HeadValues() = default;
  /// Reads `parameter` of `method`. Throws Error naming layer and head of anything else than numbers in their ranges.
  HeadValues(std::string_view method, std::string_view parameter, const Configuration& configuration,
             std::vector<Field> fields);

  bool empty() const { return layers_.empty(); }
  /// Field `field` of the query heads of a layer, or `otherwise` for each. Throws Error where the table has not this
  /// layer, or another number of heads.
  std::vector<double> of_layer(std::size_t field, double otherwise, const Problem& problem,
                               const PlanContext& context) const;
  /// For Method::check_model.
  void check_model(std::int64_t layers, std::int64_t q_heads) const;

 private:
  std::string what_;  ///< begins messages
  std::vector<Field> fields_;
  std::vector<std::vector<std::vector<double>>> layers_;  ///< [layer][head][field]
};

}  // namespace tessera
