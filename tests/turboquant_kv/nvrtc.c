// A stand-in for NVIDIA's run-time compiler: the same calls, and "code" that says what it was asked to compile.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct Program {
  char *text, *kernel, *log;
};

static char *joined(const char *a, const char *b) {
  char *out = malloc(strlen(a) + strlen(b) + 2);
  sprintf(out, "%s%s\n", a, b);
  return out;
}

int nvrtcCreateProgram(struct Program **program, const char *source, const char *name, int count,
                       const char *const *headers, const char *const *names) {
  *program = calloc(1, sizeof(struct Program));
  (*program)->text = joined(name, ":");
  for (int i = 0; i < count; i++) (*program)->text = joined((*program)->text, names[i]);
  (*program)->text = joined((*program)->text, source);
  (*program)->log = strstr(source, "#error") ? strdup("x.cu(1): error: #error\n  as written") : strdup("");
  return 0;
}

int nvrtcAddNameExpression(struct Program *program, const char *name) {
  program->kernel = strdup(name);
  return 0;
}

int nvrtcCompileProgram(struct Program *program, int count, const char *const *options) {
  for (int i = 0; i < count; i++) program->text = joined(program->text, options[i]);
  if (strstr(program->text, "#hang")) sleep(600);
  return *program->log ? 6 : 0;
}

int nvrtcGetLoweredName(struct Program *program, const char *name, const char **lowered) {
  if (strcmp(program->kernel, name)) return 10;
  *lowered = joined("lowered ", name);
  ((char *)*lowered)[strlen(*lowered) - 1] = 0;
  return 0;
}

int nvrtcGetProgramLogSize(struct Program *program, size_t *size) { return *size = strlen(program->log) + 1, 0; }
int nvrtcGetProgramLog(struct Program *program, char *log) { return strcpy(log, program->log), 0; }
int nvrtcGetCUBINSize(struct Program *program, size_t *size) { return *size = strlen(program->text), 0; }
int nvrtcGetCUBIN(struct Program *program, char *code) { return memcpy(code, program->text, strlen(program->text)), 0; }
int nvrtcDestroyProgram(struct Program **program) { return free(*program), *program = NULL, 0; }
const char *nvrtcGetErrorString(int code) { return code == 10 ? "no such name" : "an error"; }
