package harness

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
)

// AgentVariable names the agent's program; without it the harness builds one with cargo.
const AgentVariable = "PROXY_NSMGR_BIN"

var builtAgent = sync.OnceValues(findAgent)

// Program returns the path of the agent's program.
func Program(t testing.TB) string {
	t.Helper()
	path, err := builtAgent()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func findAgent() (string, error) {
	if path := os.Getenv(AgentVariable); path != "" {
		return path, nil
	}
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		return "", fmt.Errorf("cannot tell where the sources are: set %s", AgentVariable)
	}
	command := exec.Command("cargo", "build", "--quiet", "--locked", "--bin", "proxy-nsmgr",
		"--message-format=json-render-diagnostics")
	command.Dir = filepath.Join(filepath.Dir(file), "..", "..", "..")
	command.Stderr = os.Stderr
	output, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("cargo build --bin proxy-nsmgr: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(output))
	lines.Buffer(nil, len(output)+1)
	for lines.Scan() {
		var message struct {
			Executable string
			Target     struct{ Name string }
		}
		// What is no message of the kind leaves Executable empty.
		_ = json.Unmarshal(lines.Bytes(), &message)
		if message.Target.Name == "proxy-nsmgr" && message.Executable != "" {
			return message.Executable, nil
		}
	}
	return "", fmt.Errorf("cargo build named no program proxy-nsmgr: set %s", AgentVariable)
}
