# Decides whether native code can be built, without ever failing, and writes down the answer.

# Sets `reason` to "" if a C++17 compiler can compile and link, else to a sentence saying why not.
function(vq_probe_cxx reason)
  check_language(CXX)
  if(NOT CMAKE_CXX_COMPILER)
    set(${reason} "no working C++ compiler was found" PARENT_SCOPE)
    return()
  endif()
  # check_language only identifies the compiler; a linker or a standard library may still be missing.
  set(probe_dir "${CMAKE_CURRENT_BINARY_DIR}/probe_cxx")
  file(WRITE "${probe_dir}/probe.cpp"
       "#include <thread>\n#include <vector>\n"
       "int main() { std::vector<int> v{1}; std::thread([] {}).join(); return v[0] - 1; }\n")
  file(WRITE "${probe_dir}/CMakeLists.txt"
       "cmake_minimum_required(VERSION 3.22)\n"
       "project(probe LANGUAGES CXX)\n"
       "set(CMAKE_CXX_STANDARD 17)\n"
       "set(CMAKE_CXX_STANDARD_REQUIRED ON)\n"
       "find_package(Threads REQUIRED)\n"
       "add_executable(probe probe.cpp)\n"
       "target_link_libraries(probe PRIVATE Threads::Threads)\n")
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -S "${probe_dir}" -B "${probe_dir}/build" -G "${CMAKE_GENERATOR}"
            "-DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}" "-DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}"
    RESULT_VARIABLE configured OUTPUT_VARIABLE probe_log ERROR_VARIABLE probe_log)
  execute_process(COMMAND "${CMAKE_COMMAND}" --build "${probe_dir}/build"
                  RESULT_VARIABLE built OUTPUT_VARIABLE build_log ERROR_VARIABLE build_log)
  if(configured EQUAL 0 AND built EQUAL 0)
    set(${reason} "" PARENT_SCOPE)
  else()
    file(WRITE "${probe_dir}/probe.log" "${probe_log}\n${build_log}")
    set(${reason} "the C++ compiler ${CMAKE_CXX_COMPILER} could not build a small C++17 program"
        PARENT_SCOPE)
  endif()
endfunction()

# Records what was built, for vqkernels.native_status().
function(vq_write_build_info path)
  string(REPLACE "\"" "'" reason_text "${VQ_NATIVE_REASON}")
  string(REPLACE "\\" "/" reason_text "${reason_text}")
  string(REPLACE ";" "\", \"" tiers_text "${VQ_NATIVE_TIERS}")
  if(NOT tiers_text STREQUAL "")
    set(tiers_text "\"${tiers_text}\"")
  endif()
  if(VQ_NATIVE_REASON STREQUAL "")
    set(native true)
    set(compiler_text "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  else()
    set(native false)
    set(compiler_text "")
  endif()
  file(WRITE "${path}"
       "{\n  \"native\": ${native},\n  \"reason\": \"${reason_text}\",\n"
       "  \"compiler\": \"${compiler_text}\",\n  \"tiers\": [${tiers_text}]\n}\n")
endfunction()
