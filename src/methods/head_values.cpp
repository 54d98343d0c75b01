#include "methods/head_values.h"

#include <fmt/format.h>

#include <utility>

#include "core/error.h"
#include "methods/configuration.h"

namespace tessera {

namespace {

double number_of(const Json& head, const HeadValues::Field& field, const std::string& where) {
  const bool bare = field.name.empty();
  require(bare || (head.is_object() && head.contains(field.name)), "{} is {}; expected an object with '{}'", where,
          head.dump(), field.name);
  const Json& value = bare ? head : head[field.name];
  const bool valid = value.is_number() && value.get<double>() >= field.least && value.get<double>() <= field.most;
  require(valid, "{}{}{} is {}; expected a number in [{}, {}]", where, bare ? "" : ", ", field.name, value.dump(),
          field.least, field.most);
  return value.get<double>();
}

}  // namespace

HeadValues::HeadValues(std::string_view method, std::string_view parameter, const Configuration& configuration,
                       std::vector<Field> fields)
    : what_(fmt::format("{}: {} '{}'", method, parameter, configuration.name())), fields_(std::move(fields)) {
  if (configuration.empty()) return;
  const Json table = read_configuration(configuration);
  require(table.is_array() && !table.empty(), "{} is not an array of layers", what_);
  for (const Json& layer : table) {
    require(layer.is_array(), "{}: layer {} is not an array of heads", what_, layers_.size());
    auto& heads = layers_.emplace_back();
    for (const Json& head : layer) {
      const std::string where = fmt::format("{}: layer {}, head {}", what_, layers_.size() - 1, heads.size());
      std::vector<double> values;
      values.reserve(fields_.size());
      for (const Field& field : fields_) values.push_back(number_of(head, field, where));
      heads.push_back(std::move(values));
    }
  }
}

std::vector<double> HeadValues::of_layer(std::size_t field, double otherwise, const Problem& problem,
                                         const PlanContext& context) const {
  std::vector<double> values(static_cast<std::size_t>(problem.q_heads), otherwise);
  if (empty()) return values;
  require(context.layer >= 0 && context.layer < std::ssize(layers_), "{} has {} layers; layer {} was asked for", what_,
          layers_.size(), context.layer);
  const auto& heads = layers_[static_cast<std::size_t>(context.layer)];
  require(heads.size() == values.size(), "{}: layer {} has {} heads; the problem has {}", what_, context.layer,
          heads.size(), values.size());
  for (std::size_t head = 0; head < values.size(); ++head) values[head] = heads[head][field];
  return values;
}

void HeadValues::check_model(std::int64_t layers, std::int64_t q_heads) const {
  if (empty()) return;
  require(std::ssize(layers_) == layers, "{} has {} layers; the model has {}", what_, layers_.size(), layers);
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    require(std::ssize(layers_[layer]) == q_heads, "{}: layer {} has {} heads; the model has {}", what_, layer,
            layers_[layer].size(), q_heads);
  }
}

}  // namespace tessera
