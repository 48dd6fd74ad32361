package harness

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// StopDeadline bounds the drain of an agent that is told to stop.
const StopDeadline = 20 * time.Second

// Process is a program that runs until the test ends.
type Process struct {
	t       testing.TB
	name    string
	command *exec.Cmd
	logPath string
	exited  chan struct{}
	err     error // set before exited is closed
	once    sync.Once
}

// startProcess starts command and registers its end with the test. The process dies with the test
// program, whatever happens to that.
func startProcess(t testing.TB, name string, command *exec.Cmd) *Process {
	t.Helper()
	logPath := filepath.Join(t.TempDir(), "log")
	log, err := os.Create(logPath)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	command.Stdout, command.Stderr = log, log
	if command.SysProcAttr == nil {
		command.SysProcAttr = &syscall.SysProcAttr{}
	}
	command.SysProcAttr.Pdeathsig = syscall.SIGKILL
	p := &Process{t: t, name: name, command: command, logPath: logPath, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig is sent when the thread that started the process ends: this one waits for it.
		runtime.LockOSThread()
		err := command.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = command.Wait()
		close(p.exited)
	}()
	if err := <-started; err != nil {
		t.Fatalf("cannot start %s: %v", name, err)
	}
	t.Cleanup(p.finish)
	return p
}

// Log returns what the process has written so far.
func (p *Process) Log() string {
	text, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Pid returns the process's id.
func (p *Process) Pid() int {
	return p.command.Process.Pid
}

// Kill ends the process at once, as a crash would.
func (p *Process) Kill() {
	p.t.Helper()
	p.once.Do(func() {
		_ = p.command.Process.Kill()
		<-p.exited
	})
}

// Stop tells the process to end and waits for it. It must drain in time, leave with exit code 0 and
// have logged no ERROR.
func (p *Process) Stop() {
	p.t.Helper()
	p.once.Do(func() {
		_ = p.command.Process.Signal(p.stopSignal())
		select {
		case <-p.exited:
			if p.err != nil {
				p.t.Errorf("%s ended with %v", p.name, p.err)
			}
		case <-time.After(StopDeadline):
			_ = p.command.Process.Kill()
			<-p.exited
			p.t.Errorf("%s did not end within %v of %v", p.name, StopDeadline, p.stopSignal())
		}
		for line := range strings.Lines(p.Log()) {
			if strings.Contains(line, `"level":"ERROR"`) {
				p.t.Errorf("%s logged an ERROR: %s", p.name, line)
			}
		}
	})
}

// stopSignal is SIGTERM, or SIGINT for an agent: by SIGTERM it would leave its links to the next one.
func (p *Process) stopSignal() syscall.Signal {
	if len(p.command.Args) > 1 && slices.Contains(p.command.Args, "agent") {
		return syscall.SIGINT
	}
	return syscall.SIGTERM
}

// Exited tells whether the process has ended.
func (p *Process) Exited() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

func (p *Process) finish() {
	if p.Exited() {
		p.once.Do(func() { p.t.Errorf("%s ended before the test did: %v", p.name, p.err) })
	}
	p.Stop()
	if p.t.Failed() {
		p.t.Logf("log of %s:\n%s", p.name, lastLines(p.Log(), 200))
	}
}

func lastLines(text string, count int) string {
	lines := bytes.SplitAfter([]byte(text), []byte("\n"))
	if len(lines) <= count {
		return text
	}
	return "…\n" + string(bytes.Join(lines[len(lines)-count:], nil))
}

// ResidentBytes is the process's resident memory.
func (p *Process) ResidentBytes(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	var size, resident int
	if _, err := fmt.Sscan(string(text), &size, &resident); err != nil {
		t.Fatal(err)
	}
	return resident * os.Getpagesize()
}
