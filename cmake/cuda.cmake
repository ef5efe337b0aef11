# Decides whether CUDA kernels are built (SAFT_CUDA = AUTO | ON | OFF) and says so in SAFT_CUDA_STATUS.
# nvcc may be a wrapper script, so the toolkit is asked for its root instead of guessing from the path.

if(NOT SAFT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SAFT_CUDA must be AUTO, ON or OFF, not '${SAFT_CUDA}'.")
endif()

unset(SAFT_NVCC CACHE)  # it may have come or gone since the last configuration
find_program(SAFT_NVCC nvcc NO_CMAKE_SYSTEM_PATH)  # PATH only, as the messages say
if(SAFT_CUDA STREQUAL "OFF")
  set(SAFT_CUDA_STATUS "off (SAFT_CUDA=OFF)")
elseif(NOT SAFT_NVCC)
  if(SAFT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SAFT_CUDA=ON, but nvcc is not on PATH. Install the CUDA toolkit, or set SAFT_CUDA=AUTO.")
  endif()
  set(SAFT_CUDA_STATUS "off (nvcc not found)")
else()
  execute_process(COMMAND ${SAFT_NVCC} --dryrun -x cu /dev/null OUTPUT_VARIABLE dryrun ERROR_VARIABLE dryrun)
  string(REGEX MATCH "TOP=([^\n]*)" found "${dryrun}")
  if(NOT found)
    message(FATAL_ERROR "nvcc (${SAFT_NVCC}) does not name its toolkit's root. Set SAFT_CUDA=OFF to build without CUDA.")
  endif()
  get_filename_component(SAFT_CUDA_ROOT "${CMAKE_MATCH_1}" REALPATH)
  file(GLOB SAFT_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
  if(NOT SAFT_CUDA_SOURCES)
    if(SAFT_CUDA STREQUAL "ON")
      message(FATAL_ERROR "SAFT_CUDA=ON, but this release has no CUDA kernels yet. Set SAFT_CUDA=AUTO.")
    endif()
    set(SAFT_CUDA_STATUS "off (nvcc found, but this release has no CUDA kernels)")
  endif()
endif()
message(STATUS "CUDA kernels: ${SAFT_CUDA_STATUS}")
