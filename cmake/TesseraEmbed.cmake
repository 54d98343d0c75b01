# Text files that become part of the library.

# tessera_embed(target header namespace [NAME file]...): a header in the target's generated folder with one
# std::string_view per file, holding its bytes.
function(tessera_embed target header namespace)
  string(CONCAT text "// Written by the build.\n#pragma once\n\n#include <string_view>\n\nnamespace ${namespace} {\n")
  set(arguments ${ARGN})
  while(arguments)
    list(POP_FRONT arguments name file)
    file(READ ${file} bytes HEX)
    string(REGEX REPLACE "([0-9a-f][0-9a-f])" "'\\\\x\\1'," bytes "${bytes}")
    string(APPEND text "inline constexpr char ${name}_bytes[] = {${bytes}'\\0'};\n"
                       "inline constexpr std::string_view ${name}{${name}_bytes, sizeof(${name}_bytes) - 1};\n")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  endwhile()
  string(APPEND text "}  // namespace ${namespace}\n")
  set(folder ${PROJECT_BINARY_DIR}/generated/${target})
  file(CONFIGURE OUTPUT ${folder}/${header} CONTENT "${text}" @ONLY)
  target_include_directories(${target} PRIVATE ${folder})
endfunction()
