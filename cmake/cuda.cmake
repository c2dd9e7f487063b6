# Target wsm_cudart where the CUDA device is built: headers, the static runtime, WSM_WITH_CUDA=1.
# The runtime comes from a CUDA toolkit, else from the packages nvidia-cuda-runtime and nvidia-cuda-crt of the
# Python that builds. The device is plain C++, so nvcc is not needed.

if(NOT WSM_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "WSM_CUDA is \"${WSM_CUDA}\": set it to ON, OFF or AUTO.")
endif()

set(WSM_CUDA_SUMMARY "no (WSM_CUDA=OFF)")
if(NOT WSM_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit QUIET)
  if(TARGET CUDA::cudart_static)
    set(WSM_CUDA_SUMMARY "yes (toolkit ${CUDAToolkit_VERSION}, runtime linked statically)")
    set(cudart CUDA::cudart_static)
  else()
    find_package(Python 3.10 QUIET COMPONENTS Interpreter)
    # A header of nvidia-cuda-crt, without which those of nvidia-cuda-runtime do not compile.
    find_path(WSM_CUDART_INCLUDE crt/host_defines.h NO_DEFAULT_PATH
      PATHS "${Python_SITEARCH}/nvidia/cu13/include")
    find_library(WSM_CUDART_ARCHIVE libcudart_static.a NO_DEFAULT_PATH
      PATHS "${Python_SITEARCH}/nvidia/cu13/lib")
    if(WSM_CUDART_INCLUDE AND WSM_CUDART_ARCHIVE)
      set(WSM_CUDA_SUMMARY "yes (from Python packages, runtime linked statically)")
      find_package(Threads REQUIRED)
      add_library(wsm_cudart_archive INTERFACE)
      target_include_directories(wsm_cudart_archive SYSTEM INTERFACE "${WSM_CUDART_INCLUDE}")
      target_link_libraries(wsm_cudart_archive INTERFACE
        "${WSM_CUDART_ARCHIVE}" Threads::Threads ${CMAKE_DL_LIBS} rt)
      set(cudart wsm_cudart_archive)
    elseif(WSM_CUDA STREQUAL "ON")
      message(FATAL_ERROR
        "WSM_CUDA=ON, but no CUDA toolkit with a static runtime (libcudart_static.a) was found. Install "
        "one, or name it with CUDAToolkit_ROOT=/path/to/cuda, or put its nvcc on PATH, or run "
        "`pip install \"cuda-toolkit[cudart,crt]==13.*\"` and build with --no-build-isolation; "
        "WSM_CUDA=OFF builds the host device alone.")
    else()
      set(WSM_CUDA_SUMMARY "no (no CUDA toolkit found; only the host device is built)")
    endif()
  endif()
endif()

if(cudart)
  add_library(wsm_cudart INTERFACE)
  target_link_libraries(wsm_cudart INTERFACE ${cudart})
  target_compile_definitions(wsm_cudart INTERFACE WSM_WITH_CUDA=1)
endif()
