package wire

import (
	"fmt"

	"google.golang.org/grpc/mem"
)

// frame is a message as it is on the wire.
type frame []byte

// rawCodec passes messages on without decoding them, so that nothing in them can be lost.
type rawCodec struct{}

func (rawCodec) Marshal(message any) (mem.BufferSlice, error) {
	raw, ok := message.(*frame)
	if !ok {
		return nil, fmt.Errorf("the tap sends frames, and this is %T", message)
	}
	return mem.BufferSlice{mem.SliceBuffer(*raw)}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, message any) error {
	raw, ok := message.(*frame)
	if !ok {
		return fmt.Errorf("the tap receives frames, and this is %T", message)
	}
	*raw = data.Materialize()
	return nil
}

// Name is that of the usual codec: it is part of the content type, which stays as it is.
func (rawCodec) Name() string { return "proto" }
