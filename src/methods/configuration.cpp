#include "methods/configuration.h"

namespace tessera {

Json read_configuration(const Configuration& configuration) {
  if (configuration.is_path()) return parse_json_file(configuration.text);
  return parse_json(configuration.text, configuration.name());
}

}  // namespace tessera
