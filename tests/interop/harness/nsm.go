package harness

import (
	"context"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
)

// KernelPreference is what an ordinary client asks for.
func KernelPreference() []*networkservice.Mechanism {
	return []*networkservice.Mechanism{{Cls: cls.LOCAL, Type: kernel.MECHANISM}}
}

// RequestFor asks for a service as an ordinary client does.
func RequestFor(id, service string) *networkservice.NetworkServiceRequest {
	return &networkservice.NetworkServiceRequest{
		MechanismPreferences: KernelPreference(),
		Connection: &networkservice.Connection{
			Id:             id,
			NetworkService: service,
			Context:        &networkservice.ConnectionContext{},
		},
	}
}

// Refresh asks for a connection again, as it was answered.
func Refresh(
	request *networkservice.NetworkServiceRequest, connection *networkservice.Connection,
) *networkservice.NetworkServiceRequest {
	again := request.Clone()
	again.Connection = connection.Clone()
	return again
}

// Names are the names of a path's segments.
func Names(connection *networkservice.Connection) []string {
	var names []string
	for _, segment := range connection.GetPath().GetPathSegments() {
		names = append(names, segment.GetName())
	}
	return names
}

// RegisterService registers a network service in the domain's registry.
func (d *Domain) RegisterService(ctx context.Context, t testing.TB, service *registry.NetworkService) {
	t.Helper()
	client := d.NewNSRegistryClient(ctx, sandbox.GenerateTestToken)
	if _, err := client.Register(ctx, service); err != nil {
		t.Fatalf("register %s in %s: %v", service.GetName(), d.Name, err)
	}
}
