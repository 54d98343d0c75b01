# The library is built from layers: one object library per folder of src/, in dependency order. Tests of a layer link
# only that layer and those below it, so a fault above cannot hide or break them.

set(TESSERA_LAYERS "" CACHE INTERNAL "")

add_library(tessera_options INTERFACE)
target_compile_features(tessera_options INTERFACE cxx_std_20)
target_include_directories(tessera_options INTERFACE ${PROJECT_SOURCE_DIR}/src
                           $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>)
target_compile_options(tessera_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion)
if(TESSERA_WARNINGS_AS_ERRORS)
  target_compile_options(tessera_options INTERFACE -Werror)
endif()
# Where the baseline has fused multiply-add, compilers contract a * b + c; here numbers are those of every machine.
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_compile_options(tessera_options INTERFACE -ffp-contract=off)
endif()

# tessera_layer(name [LINK targets...]): objects of src/<name>/**.cpp; inherits the links of the layers below.
function(tessera_layer name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name}/*.cpp)
  if(NOT sources)
    return()
  endif()
  add_library(tessera_${name} OBJECT ${sources})
  target_link_libraries(tessera_${name} PUBLIC tessera_options ${ARG_LINK})
  foreach(below IN LISTS TESSERA_LAYERS)
    get_target_property(links tessera_${below} TESSERA_LINK)
    target_link_libraries(tessera_${name} PUBLIC ${links})
  endforeach()
  set_target_properties(tessera_${name} PROPERTIES TESSERA_LINK "${ARG_LINK}")
  set(TESSERA_LAYERS ${TESSERA_LAYERS} ${name} CACHE INTERNAL "")
endfunction()

# Flags of the files that hold one instruction set each; every other file is built for the baseline machine.
function(tessera_kernel_levels)
  set(avx2 -mavx2 -mfma -mf16c -mbmi2)
  # Debug builds of the kernel text would take minutes per test: keep the optimiser on. Sanitizers multiply the text of
  # the unrolled loops, and -O3 then takes seven times as long to compile as -O1.
  set(optimise -O3)
  if(CMAKE_CXX_FLAGS MATCHES "-fsanitize=")
    set(optimise -O1)
  endif()
  # Fuzzers feed readers of files, no kernels; Clang takes minutes to instrument one of these.
  if(CMAKE_CXX_FLAGS MATCHES "fuzzer")
    list(APPEND optimise -fno-sanitize=all)
  endif()
  # GCC 12's own intrinsics header warns about its undefined operands (GCC bug 105593).
  set(gcc_header "")
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(gcc_header -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  set(avx512 ${avx2} ${gcc_header} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  file(GLOB_RECURSE level_files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*/level_*.cpp)
  foreach(file IN LISTS level_files)
    # level_<isa>.cpp, or level_<isa>_<text>.cpp for a text that is built on its own.
    if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
      set(flags -Wno-psabi)  # other levels are empty here, and NEON is part of the baseline of 64-bit Arm
    elseif(file MATCHES "level_avx2[_.]")
      set(flags ${avx2})
    elseif(file MATCHES "level_avx512_bf16[_.]")
      set(flags ${avx512} -mavx512bf16 -mavx512vnni)
    elseif(file MATCHES "level_avx512[_.]")
      set(flags ${avx512})
    else()
      set(flags -Wno-psabi)  # vectors of the portable level pass between inlined functions only
    endif()
    set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${flags};${optimise};-fno-math-errno;-ffp-contract=off")
    # The kernel text reaches its files through includes inside a namespace: no precompiled or unity builds.
    set_source_files_properties(${file} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  endforeach()
endfunction()

# The registry's list of methods: one line per file of src/methods/<family>/, so that adding a method is adding a file.
function(tessera_method_list)
  file(GLOB files CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/src/methods ${PROJECT_SOURCE_DIR}/src/methods/*/*.cpp)
  set(text "")
  foreach(file IN LISTS files)
    get_filename_component(stem ${file} NAME_WE)
    string(APPEND text "TESSERA_METHOD_FILE(${stem})\n")
  endforeach()
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/generated/method_list.inc CONTENT "${text}")
  target_include_directories(tessera_methods PRIVATE ${PROJECT_BINARY_DIR}/generated)
endfunction()

# The one library users link: all layers together.
function(tessera_library)
  add_library(tessera)
  add_library(tessera::tessera ALIAS tessera)
  foreach(layer IN LISTS TESSERA_LAYERS)
    target_sources(tessera PRIVATE $<TARGET_OBJECTS:tessera_${layer}>)
    get_target_property(links tessera_${layer} TESSERA_LINK)
    if(links)
      target_link_libraries(tessera PRIVATE ${links})
    endif()
  endforeach()
  target_compile_features(tessera PUBLIC cxx_std_20)
  target_include_directories(tessera PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                             $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  set_target_properties(tessera PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR} LINKER_LANGUAGE CXX)
endfunction()

# tessera_objects(target layer): link `layer` and every layer below it into an executable.
function(tessera_objects target last)
  foreach(layer IN LISTS TESSERA_LAYERS)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:tessera_${layer}>)
    get_target_property(links tessera_${layer} TESSERA_LINK)
    if(links)
      target_link_libraries(${target} PRIVATE ${links})
    endif()
    if(layer STREQUAL last)
      break()
    endif()
  endforeach()
  target_link_libraries(${target} PRIVATE tessera_options)
endfunction()
