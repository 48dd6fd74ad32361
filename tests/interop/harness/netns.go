package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// NeedsRoot skips a test that makes network namespaces and links where it may not.
func NeedsRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and links")
	}
}

// Netns is the path of the network namespace that the process is in.
func (p *Process) Netns() string {
	return fmt.Sprintf("/proc/%d/ns/net", p.Pid())
}

// OpenNamespaces is how many descriptors of network namespaces the process holds.
func (p *Process) OpenNamespaces(t testing.TB) int {
	t.Helper()
	folder := fmt.Sprintf("/proc/%d/fd", p.Pid())
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, entry := range entries {
		// A descriptor may be closed meanwhile.
		target, _ := os.Readlink(filepath.Join(folder, entry.Name()))
		if strings.HasPrefix(target, "net:[") {
			count++
		}
	}
	return count
}

// InNetns makes command run in the network namespace at path.
func InNetns(path string, command *exec.Cmd) *exec.Cmd {
	arguments := append([]string{"--net=" + path, command.Path}, command.Args[1:]...)
	inside := exec.Command("nsenter", arguments...)
	inside.Env, inside.Dir, inside.SysProcAttr = command.Env, command.Dir, command.SysProcAttr
	inside.Stdin = command.Stdin
	return inside
}

// Start starts a program that ends with the test.
func Start(t testing.TB, name string, command *exec.Cmd) *Process {
	t.Helper()
	return startProcess(t, name, command)
}
