package node

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/endpoint"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgr"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/heal"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/recvfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/ipam/point2pointipam"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	"github.com/networkservicemesh/sdk/pkg/registry/chains/memory"
	registrysendfd "github.com/networkservicemesh/sdk/pkg/registry/common/sendfd"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"proxy-nsmgr/tests/interop/harness"
)

// podVariable holds the configuration of a process that is a pod and not the tests.
const podVariable = "INTEROP_POD"

// podDeadline bounds a pod's calls; its words come a little later.
const podDeadline = 20 * time.Second

const (
	clientRole   = "client"
	endpointRole = "endpoint"
	nsmgrRole    = "nsmgr"
	registryRole = "registry"
	// nodeRole has a network namespace and does nothing.
	nodeRole = "node"
)

// podConfig is what a pod is told.
type podConfig struct {
	Role string
	// Name is the name of its path segments, and of the endpoint.
	Name string
	// NSMgr is the URL of its node's NSMgr.
	NSMgr string
	// Service is what the client asks for, or the endpoint serves.
	Service string
	// Claims makes it name its namespace by path, and pass no descriptor.
	Claims bool
	// Hidden makes the client ask for a namespace that nothing but its descriptor leads to.
	Hidden bool
	// Dir is where the endpoint's socket is.
	Dir string
	// Prefix is what the endpoint gives addresses from.
	Prefix string
	// URL is where the NSMgr is reached by other nodes, or the registry by all.
	URL string
	// Registry is the URL of the NSMgr's registry.
	Registry string
	// Proxy is the URL of the registry's proxy to other domains.
	Proxy string
}

// answer is a line of a pod's output.
type answer struct {
	Connection json.RawMessage `json:",omitempty"`
	Error      string          `json:",omitempty"`
	Code       codes.Code
	// Closes is how many Closes have reached the end of an endpoint's chain.
	Closes int `json:",omitempty"`
	// Netns is where the client's namespace can be seen.
	Netns string `json:",omitempty"`
}

// placement says where a pod runs, and as whom.
type placement struct {
	uid uint32
	// host puts it into the node's own network namespace.
	host bool
	// netns puts it into the network namespace at this path.
	netns string
}

const nobody = 65534

// pod is a running pod.
type pod struct {
	t       *testing.T
	name    string
	command *exec.Cmd
	input   *os.File
	lines   chan []byte
	ended   chan struct{}
	// hidden is where the namespace is that its links are in, if not its own.
	hidden string
}

// startPod starts a process in a network namespace of its own.
func startPod(t *testing.T, config podConfig, where placement) *pod {
	t.Helper()
	text, err := json.Marshal(config)
	require.NoError(t, err)
	// Whoever is not root cannot reach the program by its path.
	p := &pod{t: t, name: config.Name, command: exec.Command("/proc/self/exe"), ended: make(chan struct{})}
	if where.netns != "" {
		program, err := os.Executable()
		require.NoError(t, err)
		p.command = harness.InNetns(where.netns, exec.Command(program))
	}
	p.command.Env = []string{podVariable + "=" + string(text)}
	p.command.Dir = "/"
	attributes := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if !where.host && where.netns == "" {
		attributes.Cloneflags = syscall.CLONE_NEWNET
	}
	if where.uid != 0 {
		attributes.Credential = &syscall.Credential{Uid: where.uid, Gid: where.uid, NoSetGroups: false}
	}
	p.command.SysProcAttr = attributes
	log := filepath.Join(t.TempDir(), config.Name+".log")
	p.command.Stderr, err = os.Create(log)
	require.NoError(t, err)
	theirs, ours, err := os.Pipe()
	require.NoError(t, err)
	p.command.Stdin, p.input = theirs, ours
	output, err := p.command.StdoutPipe()
	require.NoError(t, err)
	started := make(chan error)
	go func() {
		defer close(p.ended)
		// Pdeathsig is sent when the thread that started the process ends: this one waits for it.
		runtime.LockOSThread()
		err := p.command.Start()
		started <- err
		if err == nil {
			_, _ = p.command.Process.Wait()
		}
	}()
	require.NoError(t, <-started)
	_ = theirs.Close()
	p.lines = make(chan []byte)
	go func() {
		defer close(p.lines)
		scanner := bufio.NewScanner(output)
		scanner.Buffer(nil, 1<<20)
		for scanner.Scan() {
			p.lines <- bytes.Clone(scanner.Bytes())
		}
	}()
	t.Cleanup(func() {
		p.end()
		if t.Failed() {
			text, _ := os.ReadFile(log)
			t.Logf("--- %s\n…%s", config.Name, text[max(0, len(text)-4000):])
		}
	})
	return p
}

// next is what the pod says next.
func (p *pod) next() answer {
	p.t.Helper()
	var said answer
	select {
	case line, goesOn := <-p.lines:
		require.True(p.t, goesOn, "%s has ended", p.name)
		require.NoError(p.t, json.Unmarshal(line, &said), "%s", line)
	case <-time.After(podDeadline + 5*time.Second):
		p.t.Fatalf("%s says nothing", p.name)
	}
	return said
}

// tell sends a command: request, close.
func (p *pod) tell(command string) answer {
	p.t.Helper()
	_, err := fmt.Fprintln(p.input, command)
	require.NoError(p.t, err)
	return p.next()
}

// end ends the pod.
func (p *pod) end() {
	_ = p.input.Close()
	_ = p.command.Process.Kill()
	<-p.ended
}

// connected asks, or asks again, and gives the connection.
func (p *pod) connected() *networkservice.Connection {
	p.t.Helper()
	said := p.tell("request")
	// The real endpoint's grpcfd now and then sends its namespace's file when the collector has closed it already, and refuses for
	// that. It is no fault of who asked, and asking again is what clients do.
	for tries := 1; tries < 3 && strings.Contains(said.Error, "file already closed"); tries++ {
		p.t.Logf("%s asks again: %s", p.name, said.Error)
		said = p.tell("request")
	}
	require.Empty(p.t, said.Error)
	connection := new(networkservice.Connection)
	require.NoError(p.t, protojson.Unmarshal(said.Connection, connection))
	return connection
}

func (p *pod) netns() string {
	if p.hidden != "" {
		return p.hidden
	}
	return fmt.Sprintf("/proc/%d/ns/net", p.command.Process.Pid)
}

// pings sends a packet to the address and waits for its answer.
func (p *pod) pings(address string) {
	p.t.Helper()
	output, err := p.ping(address)
	require.NoError(p.t, err, "%s", output)
}

func (p *pod) ping(address string) ([]byte, error) {
	host, _, _ := strings.Cut(address, "/")
	command := harness.InNetns(p.netns(), exec.Command("ping", "-n", "-c", "1", "-W", "2", host))
	return command.CombinedOutput()
}

// links are the names of the pod's links but for its loopback.
func (p *pod) links() []string {
	p.t.Helper()
	command := harness.InNetns(p.netns(), exec.Command("ip", "-brief", "link"))
	output, err := command.CombinedOutput()
	require.NoError(p.t, err, "%s", output)
	names := []string{}
	for line := range strings.Lines(string(output)) {
		if name, _, _ := strings.Cut(line, " "); name != "lo" {
			names = append(names, name)
		}
	}
	return names
}

// linksGo waits until the pod has no link: a Close is answered when nothing is sent by it any more, and the link goes a moment later.
func (p *pod) linksGo() {
	p.t.Helper()
	harness.Eventually(p.t, harness.EventDeadline, func() bool { return len(p.links()) == 0 }, func() string {
		return fmt.Sprintf("links of the pod: %v", p.links())
	})
}

// runPod is the pod's main function.
func runPod(text string) int {
	var config podConfig
	err := json.Unmarshal([]byte(text), &config)
	if err == nil {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		switch config.Role {
		case clientRole:
			err = runClient(ctx, config)
		case endpointRole:
			err = runEndpoint(ctx, config)
		case nsmgrRole:
			err = runNSMgr(ctx, config)
		case registryRole:
			err = runRegistry(ctx, config)
		case nodeRole:
			say(answer{})
			waitForEnd()
		default:
			err = fmt.Errorf("no such role: %q", config.Role)
		}
	}
	if err != nil {
		say(answer{Error: err.Error(), Code: status.Code(err)})
		return 1
	}
	return 0
}

func say(said answer) {
	line, err := json.Marshal(said)
	if err != nil {
		panic(err)
	}
	fmt.Println(string(line))
}

func runClient(ctx context.Context, config podConfig) error {
	manager, err := url.Parse(config.NSMgr)
	if err != nil {
		return err
	}
	request := harness.RequestFor(config.Name+"-connection", config.Service)
	var elements []networkservice.NetworkServiceClient
	if config.Hidden {
		netns, err := hiddenNetns()
		if err != nil {
			return err
		}
		defer func() { _ = netns.Close() }()
		say(answer{Netns: netns.Name()})
		request.MechanismPreferences = []*networkservice.Mechanism{
			kernelmech.New("file://" + netns.Name()),
		}
	} else {
		elements = append(elements, kernel.NewClient())
	}
	if !config.Claims {
		elements = append(elements, sendfd.NewClient())
	}
	chain := client.NewClient(ctx,
		client.WithName(config.Name),
		client.WithClientURL(manager),
		client.WithAuthorizeClient(authorize.NewClient(authorize.Any())),
		client.WithHealClient(heal.NewClient(ctx)),
		client.WithDialOptions(sandbox.DialOptions()...),
		client.WithDialTimeout(sandbox.DialTimeout),
		client.WithAdditionalFunctionality(elements...),
	)
	for commands := bufio.NewScanner(os.Stdin); commands.Scan(); {
		ctx, cancel := context.WithTimeout(ctx, podDeadline)
		switch commands.Text() {
		case "request":
			connection, err := chain.Request(ctx, request.Clone())
			if err != nil {
				say(answer{Error: err.Error(), Code: status.Code(err)})
				break
			}
			request.Connection = connection.Clone()
			text, err := protojson.Marshal(connection)
			if err != nil {
				cancel()
				return err
			}
			say(answer{Connection: text})
		case "close":
			_, err := chain.Close(ctx, request.GetConnection().Clone())
			said := answer{Code: status.Code(err)}
			if err != nil {
				said.Error = err.Error()
			}
			say(said)
		}
		cancel()
	}
	return nil
}

// runNSMgr is a real NSMgr as a node has it: a socket for its pods, a port for other nodes.
func runNSMgr(ctx context.Context, config podConfig) error {
	registryURL, err := url.Parse(config.Registry)
	if err != nil {
		return err
	}
	manager := nsmgr.NewServer(ctx, sandbox.GenerateTestToken,
		nsmgr.WithName(config.Name),
		nsmgr.WithURL(config.URL),
		nsmgr.WithRegistry(registryURL),
		nsmgr.WithDialOptions(sandbox.DialOptions()...),
		nsmgr.WithDialTimeout(sandbox.DialTimeout),
	)
	return serve(ctx, manager.Register, config.NSMgr, config.URL)
}

// runRegistry is a real registry.
func runRegistry(ctx context.Context, config podConfig) error {
	options := []memory.Option{
		memory.WithDefaultExpiration(time.Minute),
		memory.WithDialOptions(sandbox.DialOptions()...),
	}
	if config.Proxy != "" {
		proxy, err := url.Parse(config.Proxy)
		if err != nil {
			return err
		}
		options = append(options, memory.WithProxyRegistryURL(proxy))
	}
	served := memory.NewServer(ctx, sandbox.GenerateTestToken, options...)
	return serve(ctx, served.Register, config.URL)
}

// serve serves until the tests close the input.
func serve(ctx context.Context, register func(*grpc.Server), urls ...string) error {
	server := grpc.NewServer(grpc.Creds(grpcfd.TransportCredentials(insecure.NewCredentials())))
	register(server)
	for _, text := range urls {
		listenOn, err := url.Parse(text)
		if err != nil {
			return err
		}
		select {
		case err := <-grpcutils.ListenAndServe(ctx, listenOn, server):
			return err
		default:
		}
	}
	say(answer{})
	waitForEnd()
	return nil
}

// hiddenNetns makes a network namespace in which there is no process; its name is where this process
// has it open.
func hiddenNetns() (*os.File, error) {
	type made struct {
		file *os.File
		err  error
	}
	done := make(chan made)
	go func() {
		// Never unlocked: the thread ends with this function, and leaves the namespace by that.
		runtime.LockOSThread()
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			done <- made{err: err}
			return
		}
		fd, err := syscall.Open("/proc/thread-self/ns/net", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		done <- made{os.NewFile(uintptr(fd), fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)), err}
	}()
	result := <-done
	return result.file, result.err
}

func waitForEnd() {
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func runEndpoint(ctx context.Context, config podConfig) error {
	manager, err := url.Parse(config.NSMgr)
	if err != nil {
		return err
	}
	_, prefix, err := net.ParseCIDR(config.Prefix)
	if err != nil {
		return err
	}
	elements := []networkservice.NetworkServiceServer{
		point2pointipam.NewServer(prefix),
		recvfd.NewServer(),
		mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{
			kernelmech.MECHANISM: kernel.NewServer(),
		}),
	}
	counter := new(count.Server)
	if !config.Claims {
		elements = append(elements, sendfd.NewServer())
	}
	elements = append(elements, counter)
	chain := endpoint.NewServer(ctx, sandbox.GenerateTestToken,
		endpoint.WithName(config.Name),
		endpoint.WithAuthorizeServer(authorize.NewServer(authorize.Any())),
		endpoint.WithAdditionalFunctionality(elements...),
	)
	server := grpc.NewServer(grpc.Creds(grpcfd.TransportCredentials(insecure.NewCredentials())))
	chain.Register(server)
	socket := &url.URL{Scheme: "unix", Path: filepath.Join(config.Dir, config.Name+".sock")}
	failed := grpcutils.ListenAndServe(ctx, socket, server)
	select {
	case err := <-failed:
		return err
	default:
	}
	options := registryclient.WithDialOptions(sandbox.DialOptions()...)
	ctx, cancel := context.WithTimeout(ctx, podDeadline)
	defer cancel()
	services := registryclient.NewNetworkServiceRegistryClient(ctx,
		registryclient.WithClientURL(manager), options)
	if _, err := services.Register(ctx, &registry.NetworkService{Name: config.Service}); err != nil {
		return err
	}
	endpoints := registryclient.NewNetworkServiceEndpointRegistryClient(ctx,
		registryclient.WithClientURL(manager), options,
		registryclient.WithNSEAdditionalFunctionality(
			registrysendfd.NewNetworkServiceEndpointRegistryClient()))
	registered, err := endpoints.Register(ctx, &registry.NetworkServiceEndpoint{
		Name:                config.Name,
		NetworkServiceNames: []string{config.Service},
		Url:                 socket.String(),
	})
	if err != nil {
		return err
	}
	say(answer{})
	for commands := bufio.NewScanner(os.Stdin); commands.Scan(); {
		switch commands.Text() {
		case "closes":
			say(answer{Closes: counter.Closes()})
		case "unregister":
			if _, err := endpoints.Unregister(ctx, registered); err != nil {
				return err
			}
			say(answer{})
		}
	}
	return nil
}
