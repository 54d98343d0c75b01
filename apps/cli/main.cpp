// The entry point of `tessera`.
#include "command.h"

int main(int argc, char** argv) {
  return tessera::cli::run_command_line(argc, argv);
}
