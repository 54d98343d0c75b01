# Copies the shared libraries that `module` needs and that not every Linux has into tessera/lib of the package, each
# under the name by which it is looked up. libc, libstdc++ and libgcc come with any Python.
file(GET_RUNTIME_DEPENDENCIES LIBRARIES ${module} RESOLVED_DEPENDENCIES_VAR found UNRESOLVED_DEPENDENCIES_VAR missing
     PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|dl|rt|pthread|stdc\\+\\+|gcc_s)\\.so")
if(missing)
  message(FATAL_ERROR "libraries that ${module} needs are missing: ${missing}")
endif()
set(folder ${CMAKE_INSTALL_PREFIX}/tessera/lib)
file(MAKE_DIRECTORY ${folder})
foreach(library IN LISTS found)
  get_filename_component(name ${library} NAME)
  file(REAL_PATH ${library} file)
  file(COPY_FILE ${file} ${folder}/${name} ONLY_IF_DIFFERENT)
  message(STATUS "Carried: ${name}")
endforeach()
