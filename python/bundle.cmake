# Copies the shared libraries that `module` needs and that not every Linux has into tessera/lib of the package, each
# under the name by which it is looked up, with its licence where Debian tells it. libc, libstdc++ and libgcc come with
# any Python.
file(GET_RUNTIME_DEPENDENCIES LIBRARIES ${module} DIRECTORIES ${folders} RESOLVED_DEPENDENCIES_VAR found
     UNRESOLVED_DEPENDENCIES_VAR missing PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|dl|rt|pthread|stdc\\+\\+|gcc_s)\\.so")
if(missing)
  message(FATAL_ERROR "libraries that ${module} needs are missing: ${missing}")
endif()
set(folder ${CMAKE_INSTALL_PREFIX}/tessera/lib)
file(MAKE_DIRECTORY ${folder})
find_program(dpkg_query dpkg-query)
foreach(library IN LISTS found)
  get_filename_component(name ${library} NAME)
  file(REAL_PATH ${library} file)
  file(COPY_FILE ${file} ${folder}/${name} ONLY_IF_DIFFERENT)
  message(STATUS "Carried: ${name}")
  if(dpkg_query)
    execute_process(COMMAND ${dpkg_query} --search "*/${name}" OUTPUT_VARIABLE owner ERROR_QUIET)
    string(REGEX MATCH "^[^:,]+" package "${owner}")
    if(package AND EXISTS /usr/share/doc/${package}/copyright)
      file(COPY_FILE /usr/share/doc/${package}/copyright ${folder}/${name}.copyright ONLY_IF_DIFFERENT)
    endif()
  endif()
endforeach()
